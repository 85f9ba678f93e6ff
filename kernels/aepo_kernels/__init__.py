"""Log-probs, entropies and policy losses of a language-model head, without materialised logits.

Public are the names below and those that `aepo_kernels.cpu` lists: what a transformer's layers and
samplers do on a CPU.
"""

from aepo_kernels._version import __version__
from aepo_kernels.api import linear_logprob, linear_token_loss
from aepo_kernels.backends import (
    backend_status,
    multiplies_bfloat16,
    resolve_backend,
    row_kernels,
)
from aepo_kernels.gemm import whole_sums
from aepo_kernels.problem import LogprobOutput, RowSampling, TokenLossOutput, VocabShard

__all__ = [
    "LogprobOutput",
    "RowSampling",
    "TokenLossOutput",
    "VocabShard",
    "__version__",
    "backend_status",
    "linear_logprob",
    "linear_token_loss",
    "multiplies_bfloat16",
    "resolve_backend",
    "row_kernels",
    "whole_sums",
]
