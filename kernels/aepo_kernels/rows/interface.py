"""The interface of row operations: a row's statistics, and the coefficients of its gradient.

A module of row operations has `row_stats` and `row_grad` with the signatures of
`aepo_kernels.rows.torch_rows`. Raw logits, [C, V], are the output of the first GEMM: hidden @
weight.T. A `LogitMap` turns raw logits into logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class LogitMap:
    """How raw logits x become logits: softcap * tanh(scale * (x + bias) / softcap).

    bias: [V] or None. softcap: None leaves scale * (x + bias).
    """

    bias: Tensor | None
    softcap: float | None
    scale: float


class RowStats(NamedTuple):
    """Statistics of rows under their temperature T, each [C], in nats.

    max_logit: the largest logit before temperature. log_sum = log sum_j exp((logit_j - max_logit) /
    T), so that lse = max_logit / T + log_sum. sum_squares = sum_j p_j^2. logit_sum: the sum of the
    logits before temperature. is_top1: 1 where the target is the first of the tokens with the
    largest logit, else 0. The last three are None unless they are asked for.
    """

    logprob: Tensor
    entropy: Tensor
    max_logit: Tensor
    log_sum: Tensor
    second_logprob: Tensor | None
    second_log_sum: Tensor | None
    sum_squares: Tensor | None = None
    logit_sum: Tensor | None = None
    is_top1: Tensor | None = None

    def select(self, rows: Tensor | slice) -> RowStats:
        """The statistics of some rows, [rows] each."""
        return RowStats(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


class RowCoefs(NamedTuple):
    """Derivatives of the loss by a row's outputs, each [C], or None where all are zero."""

    logprob: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None
    second_logprob: Tensor | None

    def select(self, rows: Tensor | slice) -> RowCoefs:
        """The coefficients of some rows, [rows] each."""
        return RowCoefs(*(None if x is None else x[rows] for x in self))

    def times(self, factor: Tensor) -> RowCoefs:
        """All coefficients times a factor, []."""
        return RowCoefs(*(None if x is None else x * factor for x in self))
