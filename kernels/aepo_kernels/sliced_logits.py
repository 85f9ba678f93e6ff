"""Logits that wait for their gradient in memory which is written only then: the weight's gradient.

A slice of S rows of the vocabulary has S x H numbers of gradient, and for T <= H tokens S x T
logits (T <= 2 H where the gradient's numbers are twice as wide). A slice's logits are read for the
last time just before its gradient is written, so that both have room, and no logit of those tokens
is made twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from aepo_kernels.chunks import Head


@dataclass(frozen=True)
class SlicedLogits:
    """Raw logits of `tokens` tokens, [T, V], a slice of `size` columns after the other.

    memory: contiguous [V, room] with T <= room; rows a to b have columns a to b at their front, as
    the head's `logits_in` lays them out.
    picked: indices [M] of the tokens that are still wanted, or None for all.
    """

    memory: Tensor
    tokens: int
    size: int
    picked: Tensor | None = None

    def read(self, head: Head, rows: slice, out: Tensor) -> Tensor:
        """The logits of the wanted tokens at one slice, in `out` where they have to be picked."""
        logits = head.logits_in(self.memory[rows], self.tokens)
        if self.picked is None:
            return logits
        if head.by_columns:
            return torch.index_select(logits.T, 1, self.picked, out=out.T).T
        return torch.index_select(logits, 0, self.picked, out=out)
