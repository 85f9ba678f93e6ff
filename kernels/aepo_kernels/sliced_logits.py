"""Logits that wait for their gradient in memory which is written only then: the weight's gradient.

A slice of S rows of the vocabulary has S x H numbers of gradient, and for T <= H tokens S x T
logits (T <= 2 H where the gradient's numbers are twice as wide). A slice's logits are read for the
last time just before its gradient is written, so that both have room, and no logit of those tokens
is made twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SlicedLogits:
    """Raw logits of `tokens` tokens, [T, V], a slice of `size` columns after the other.

    memory: contiguous [V, room] with T <= room; rows a to b have columns a to b at their front.
    picked: indices [M] of the tokens that are still wanted, or None for all.
    """

    memory: Tensor
    tokens: int
    size: int
    picked: Tensor | None = None

    def at(self, rows: slice) -> Tensor:
        """The logits of all tokens at one slice of the vocabulary: [T, columns]."""
        part = self.memory[rows]
        return part.view(-1)[: self.tokens * len(part)].view(self.tokens, len(part))

    def read(self, rows: slice, space: Tensor) -> Tensor:
        """The logits of the wanted tokens at one slice, in `space` where they have to be picked."""
        if self.picked is None:
            return self.at(rows)
        return torch.index_select(self.at(rows), 0, self.picked, out=space)
