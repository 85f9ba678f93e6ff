"""Raw logits that wait for their gradient, one slice of the vocabulary after the other.

The best place is memory that is not written before: the weight's gradient. For T tokens, a slice of
S rows of the vocabulary has S x T logits, and its gradient has S x H numbers. A slice's logits are
read for the last time just before its gradient is written. So one memory can hold both where T
logits take no more bytes than a row of the gradient. No logit of such tokens is made twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def logits_in(memory: Tensor, tokens: int, num_rows: int, *, column_major: bool) -> Tensor:
    """The front of contiguous memory as [C, V]; column-major is the transpose of [V, C]."""
    front = memory.view(-1)[: tokens * num_rows]
    return front.view(num_rows, tokens).T if column_major else front.view(tokens, num_rows)


@dataclass(frozen=True)
class StashedLogits:
    """Logits [T, V] of T = `tokens` tokens: one slice of `size` columns after the other.

    memory: contiguous [V, M] with T <= M; the front of rows a to b holds columns a to b, in the
    layout of `logits_in`. bases: None for raw logits; or [slices, T] float32 for a float16 memory,
    see `cpu.rows.row_stats`. picked: indices [A] of the tokens that are still wanted, or None for
    all.
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
        """A stash for as many of the tokens as `memory`, [V, M], can hold, in its dtype."""
        tokens, bases = min(tokens, memory.shape[1]), None
        if memory.dtype == torch.float16:
            bases = memory.new_empty(-(-len(memory) // size), tokens, dtype=torch.float32)
        return cls(memory, tokens, size, column_major, bases)

    def at(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """A slice's logits as [T, S], and its base [T] or None."""
        base = None if self.bases is None else self.bases[rows.start // self.size]
        memory, num_rows = self.memory[rows], rows.stop - rows.start
        return logits_in(memory, self.tokens, num_rows, column_major=self.column_major), base

    def read(self, rows: slice, out: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A slice's logits of the wanted tokens, and further arguments for `cpu.rows.row_grad`.

        Raw logits that have to be picked are copied to `out`, [A, S].
        """
        logits, base = self.at(rows)
        if base is not None:
            return logits, {"base": base} | ({} if self.picked is None else {"picked": self.picked})
        if self.picked is None:
            return logits, {}
        if self.column_major:
            return torch.index_select(logits.T, 1, self.picked, out=out.T).T, {}
        return torch.index_select(logits, 0, self.picked, out=out), {}
