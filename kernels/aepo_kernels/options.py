"""Options of the two functions that are more than a number: a sharded vocabulary, sampled rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of a head whose vocabulary is split over the ranks of a process group.

    start: the first token id of this rank's rows of weight (and bias, and lora_b). vocab: the size
    of the whole vocabulary, all ranks together. group: a torch.distributed process group, or None
    for the default one. Hidden states, targets and token tensors are equal on all ranks.
    """

    start: int
    vocab: int
    group: Any = None


@dataclass(frozen=True)
class RowSampling:
    """Unbiased sampling of the rows that take part in the gradient GEMMs.

    A token of size s = |c_lp| (1 - p) + |c_second| (1 - p_second) + |c_H| min(H, 1), the c being
    the loss's derivatives, is kept with probability q = min(1, s / threshold), and its gradient is
    divided by q, which is at least 0.001. generator: source of randomness, on hidden's device; None
    is torch's default.
    """

    threshold: float
    generator: torch.Generator | None = None
