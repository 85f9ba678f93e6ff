"""Arguments and results of both functions: the problem, its options and the output tuples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from aepo_kernels.backends import FEATURES, Features, row_kernels
from aepo_kernels.tensors import rows_of_dtensor

TokenLoss = Callable[..., Any]
# The differentiable outputs of `linear_logprob`, in the order of `LogprobOutput` and `RowCoefs`.
OUTPUTS = "logprob", "entropy", "lse", "second_logprob"


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of a head whose vocabulary is split over the ranks of a process group.

    start: the token id of this rank's first row of weight, bias and lora_b. vocab: the size of the
    whole vocabulary, all ranks together. group: a torch.distributed process group, or None for the
    default one. Hidden states, targets and token tensors are equal on all ranks, and either all
    ranks' heads need a gradient or none does.

    reduce_hidden: add up hidden's gradient over the ranks. Each rank's own part is only what its
    rows of the vocabulary bring. Pass False where the backward of whatever made hidden adds these
    parts up itself, as the gather of sequence parallelism does; it would count the sum once for
    each rank. Every rank passes the same value. lora_a's gradient is added up in any case.
    """

    start: int
    vocab: int
    group: Any = None
    reduce_hidden: bool = True

    @classmethod
    def from_dtensor(cls, weight: Tensor, *, reduce_hidden: bool = True) -> VocabShard:
        """The shard that a DTensor's local tensor is; pass weight.to_local() beside it.

        weight: [V, H], a DTensor that is split by rows over a mesh of one dimension. The last ranks
        may have fewer rows, as torch.chunk gives them. No rank waits for another one. Raises
        ValueError for every other tensor.
        """
        start, group = rows_of_dtensor(weight)
        return cls(start, weight.shape[0], group, reduce_hidden)


@dataclass(frozen=True)
class RowSampling:
    """Unbiased sampling of the rows that take part in the gradient GEMMs.

    A token has the size s = |c_lp| (1 - p) + |c_second| (1 - p_second) + |c_H| min(H, 1), where
    each c is the loss's derivative by that output. The token is kept with probability q = min(1, s
    / threshold), at least 0.001, and its gradient is divided by q. threshold: positive, in the
    loss's units. generator: source of randomness, on hidden's device; None is torch's default.
    """

    threshold: float
    generator: torch.Generator | None = None


class LogprobOutput(NamedTuple):
    """Per-token results of `linear_logprob`, in nats; tensors are [N], 0 at ignored positions.

    row_kernels: of the backend that ran: "triton", "c++ (avx512)" or "torch (why)". mean_logits:
    the mean over the vocabulary of logits / temperature. is_top1: bool, whether the target is the
    first of the tokens with the largest logit.
    """

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    second_logprob: Tensor | None
    sum_squares: Tensor | None
    backend: str
    row_kernels: str
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


class TokenLossOutput(NamedTuple):
    """Results of `linear_token_loss`; `loss` has a gradient, everything else is detached.

    loss: []. metrics: sums over chunks. logprob, entropy, second_logprob: [N] in nats, 0 at ignored
    positions. active_rows: tokens that took part in the gradient GEMMs, 0 without gradient.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logprob: Tensor
    entropy: Tensor
    second_logprob: Tensor | None
    backend: str
    row_kernels: str
    active_rows: int


@dataclass(frozen=True)
class Problem:
    """A head applied to hidden states: logits = softcap * tanh(scale * (h W^T + b) / softcap).

    hidden: [N, H]. weight: [V, H]. targets: [N], int64. bias: [V]. Temperatures: float or [N].
    active: [A], int64, tokens at which a loss has a gradient, or None for all. lora_a [R, H] and
    lora_b [V, R] add lora_scale * lora_b @ lora_a to the weight. weight_grad: [V, H], the weight's
    gradient is added to it instead of returned. With a shard, V counts this rank's rows. kept_ids:
    [N, K], int64, the only tokens of each row's distribution, padded with -1. grad_of: names of the
    outputs whose gradients are taken, or None for any of them. check_loss: see `loss_checks`.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    temperature: float | Tensor = 1.0
    second_temperature: float | Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    ignore_index: int | None = -100
    chunk_tokens: int | None = None
    backend: str = "chunked"
    logits_dtype: torch.dtype | None = None
    active: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    lora_scale: float = 1.0
    weight_grad: Tensor | None = None
    shard: VocabShard | None = None
    row_sampling: RowSampling | None = None
    sum_squares: bool = False
    mean_logits: bool = False
    is_top1: bool = False
    weight_slice: int | None = None
    check_loss: bool = True
    kept_ids: Tensor | None = None
    grad_of: tuple[str, ...] | None = None

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """The tensors that can have a gradient: hidden, weight, bias, lora_a, lora_b."""
        return self.hidden, self.weight, self.bias, self.lora_a, self.lora_b

    @property
    def needs(self) -> tuple[bool, ...]:
        """Which of the `inputs` need a gradient."""
        is_enabled = torch.is_grad_enabled()
        return tuple(is_enabled and x is not None and x.requires_grad for x in self.inputs)

    def with_inputs(self, inputs: Sequence[Tensor | None]) -> Problem:
        """The same problem with other `inputs`, in the order of `inputs`."""
        names = "hidden", "weight", "bias", "lora_a", "lora_b"
        return replace(self, **dict(zip(names, inputs, strict=True)))  # type: ignore[arg-type]

    @property
    def vocab(self) -> int:
        """The size of the whole vocabulary."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocab

    @property
    def chunk_vocab(self) -> int:
        """Rows of weight that decide the sizes of chunks; the same number on all ranks."""
        if self.shard is None:
            return self.weight.shape[0]
        return -(-self.shard.vocab // dist.get_world_size(self.shard.group))

    @property
    def stats_dtype(self) -> torch.dtype:
        """The dtype of row statistics and of gradient accumulation."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def features(self) -> Features:
        """What this problem's backend does, and which arguments it takes."""
        return FEATURES[self.backend]

    @property
    def row_kernels(self) -> str:
        """Which row operations run: see `backends.row_kernels`."""
        if self.kept_ids is not None:
            return "torch (kept_ids)"
        return row_kernels(self.hidden.device.type, self.hidden.dtype, self.backend)

    def kept(self) -> Tensor | None:
        """Positions [M] of tokens that are not ignored, or None if none is ignored."""
        if self.ignore_index is None:
            return None
        # The count of kept tokens sizes every later buffer, so on CUDA this waits for the device.
        positions = (self.targets != self.ignore_index).nonzero().squeeze(1)
        return None if len(positions) == len(self.targets) else positions

    def spread(self, values: Tensor, positions: Tensor | slice | None) -> Tensor:
        """Values [M] of the tokens at `positions` as [N], with zeros at all other tokens."""
        if not isinstance(positions, Tensor):
            return values
        return values.new_zeros(len(self.targets)).index_copy(0, positions, values)


def sum_losses(result: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Split the result of a token loss into its scalar loss, [], and its metrics.

    Raises ValueError where the loss is not a scalar.
    """
    loss, metrics = result if isinstance(result, tuple) else (result, {})
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"token_loss returned {shape}: the loss of a chunk must be a scalar tensor, "
            "the sum over its tokens; add .sum()"
        )
    return loss.reshape(()), metrics
