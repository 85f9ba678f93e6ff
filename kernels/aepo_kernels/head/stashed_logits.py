"""Raw logits that wait for their gradient, one slice of the vocabulary after the other.

The best place is memory that is written only then: the weight's gradient. A slice of S rows of the
vocabulary has S x H numbers of gradient, and for T tokens S x T logits. A slice's logits are read
for the last time just before its gradient is written. So both fit where T logits take no more bytes
than a row of the gradient, and no logit of those tokens is made twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def logits_in(memory: Tensor, tokens: int, num_rows: int, *, column_major: bool) -> Tensor:
    """[C, V] at the front of contiguous memory; column-major, it is the transpose of [V, C]."""
    front = memory.view(-1)[: tokens * num_rows]
    return front.view(num_rows, tokens).T if column_major else front.view(tokens, num_rows)


@dataclass(frozen=True)
class StashedLogits:
    """Logits of `tokens` tokens, [T, V], a slice of `size` columns after the other.

    memory: contiguous [V, M] with T <= M; rows a to b have columns a to b at their front, as
    `logits_in` lays them out. bases: None of raw logits; or [slices, T] float32, and the memory has
    float16, see `cpu.rows.row_stats`. picked: indices [A] of the tokens that are still wanted, or
    None for all.
    """

    memory: Tensor
    tokens: int
    size: int
    column_major: bool
    bases: Tensor | None = None
    picked: Tensor | None = None

    @classmethod
    def in_memory(
        cls, memory: Tensor, tokens: int, size: int, *, column_major: bool
    ) -> StashedLogits:
        """A stash for as many of the tokens as `memory` has room for, of its dtype."""
        tokens, bases = min(tokens, memory.shape[1]), None
        if memory.dtype == torch.float16:
            bases = memory.new_empty(-(-len(memory) // size), tokens, dtype=torch.float32)
        return cls(memory, tokens, size, column_major, bases)

    def at(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """A slice's memory as [T, S], and its base [T] if it has one."""
        base = None if self.bases is None else self.bases[rows.start // self.size]
        memory, num_rows = self.memory[rows], rows.stop - rows.start
        return logits_in(memory, self.tokens, num_rows, column_major=self.column_major), base

    def read(self, rows: slice, out: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A slice's logits of the wanted tokens, and what `cpu.rows.row_grad` has to know of them.

        Raw ones are in `out`, [A, S], where they have to be picked.
        """
        logits, base = self.at(rows)
        if base is not None:
            return logits, {"base": base} | ({} if self.picked is None else {"picked": self.picked})
        if self.picked is None:
            return logits, {}
        if self.column_major:
            return torch.index_select(logits.T, 1, self.picked, out=out.T).T, {}
        return torch.index_select(logits, 0, self.picked, out=out), {}
