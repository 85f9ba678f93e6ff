"""Logits that wait for their gradient a slice of the vocabulary after the other.

The best place is memory that is written only then: the weight's gradient. A slice of S rows of the
vocabulary has S x H numbers of gradient, and for T tokens S x T logits. A slice's logits are read
for the last time just before its gradient is written, so that both have room where T logits take no
more bytes than a row of the gradient, and no logit of those tokens is made twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def logits_in(space: Tensor, tokens: int, num_rows: int, *, by_columns: bool) -> Tensor:
    """[C, V] at the front of contiguous memory: by rows, or by columns as a matrix [V, C]."""
    front = space.view(-1)[: tokens * num_rows]
    return front.view(num_rows, tokens).T if by_columns else front.view(tokens, num_rows)


@dataclass(frozen=True)
class SlicedLogits:
    """Logits of `tokens` tokens, [T, V], a slice of `size` columns after the other.

    memory: contiguous [V, room] with T <= room; rows a to b have columns a to b at their front, as
    `logits_in` lays them out.
    by_columns: logits lie by columns, as the transpose of a contiguous matrix.
    bases: None of raw logits; or [slices, T] float32, and the memory has float16, see
    `cpu.rows.row_stats`.
    picked: indices [M] of the tokens that are still wanted, or None for all.
    """

    memory: Tensor
    tokens: int
    size: int
    by_columns: bool
    bases: Tensor | None = None
    picked: Tensor | None = None

    @classmethod
    def in_memory(cls, memory: Tensor, tokens: int, size: int, *, by_columns: bool) -> SlicedLogits:
        """Those of as many of the tokens as `memory` has room for, of its dtype."""
        tokens, bases = min(tokens, memory.shape[1]), None
        if memory.dtype == torch.float16:
            bases = memory.new_empty(-(-len(memory) // size), tokens, dtype=torch.float32)
        return cls(memory, tokens, size, by_columns, bases)

    def at(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """A slice's memory as [T, S], and its base if it has one."""
        num_rows = rows.stop - rows.start
        base = None if self.bases is None else self.bases[rows.start // self.size]
        return logits_in(self.memory[rows], self.tokens, num_rows, by_columns=self.by_columns), base

    def read(self, rows: slice, out: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A slice's logits of the wanted tokens, and what `cpu.rows.row_grad` has to know of them.

        Raw ones are in `out` where they have to be picked.
        """
        logits, base = self.at(rows)
        if base is not None:
            return logits, {"base": base} | ({} if self.picked is None else {"picked": self.picked})
        if self.picked is None:
            return logits, {}
        if self.by_columns:
            return torch.index_select(logits.T, 1, self.picked, out=out.T).T, {}
        return torch.index_select(logits, 0, self.picked, out=out), {}
