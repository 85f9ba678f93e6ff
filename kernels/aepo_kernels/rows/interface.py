"""The interface of row operations: what a row of logits gives, and what its gradient takes.

A row backend is a module with `row_stats` and `row_grad` of the signatures in
`aepo_kernels.rows.torch_rows`. Raw logits, [C, V], are the output of the first GEMM: hidden @
weight.T. `LogitMap` says how they become logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class LogitMap:
    """Raw logits to logits: softcap * tanh(scale * (x + bias) / softcap). bias: [V] or None."""

    bias: Tensor | None
    softcap: float | None
    scale: float


class RowStats(NamedTuple):
    """Statistics of tempered rows, each [C]; `max_logit` is of the logits before temperature.

    log_sum = log sum_j exp((logit_j - max_logit) / T), so lse = max_logit / T + log_sum.
    sum_squares = sum_j p_j^2, where asked for.
    """

    logprob: Tensor
    entropy: Tensor
    max_logit: Tensor
    log_sum: Tensor
    second_logprob: Tensor | None
    second_log_sum: Tensor | None
    sum_squares: Tensor | None = None

    def select(self, rows: Tensor | slice) -> RowStats:
        """The statistics of some rows."""
        return RowStats(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


class RowCoefs(NamedTuple):
    """Derivatives of the loss by a row's outputs, each [C], or None where all are zero."""

    logprob: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None
    second_logprob: Tensor | None

    def select(self, rows: Tensor | slice) -> RowCoefs:
        """The coefficients of some rows."""
        return RowCoefs(*(None if x is None else x[rows] for x in self))
