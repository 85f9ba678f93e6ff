"""Gradients on a CPU of so many tokens that a float32 sum of hidden's gradient would be large.

Logits are made by blocks: some tokens by some rows of the vocabulary. The sum of hidden's gradient
has memory of its own up to a budget. The rest of the sum borrows the gradient of the weight's last
rows, and is rounded before these rows are written. The logits of these rows alone are made once
more. So memory beside the gradients is bounded at any N and V.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aepo_kernels.head.accumulators import Gradients
from aepo_kernels.head.parts import Part, join_parts
from aepo_kernels.head.plan import Plan
from aepo_kernels.head.projection import Head
from aepo_kernels.head.row_sampling import rows_with_gradient
from aepo_kernels.head.tokens import Tokens
from aepo_kernels.ranges import part_of, slices, slices_of_runs, take
from aepo_kernels.rows.interface import RowCoefs, RowStats


class BlockPass:
    """Keeps rows without logits, and adds their gradients to `total` by blocks in `finish`."""

    def __init__(self, plan: Plan, head: Head, total: Gradients) -> None:
        self.plan, self.head, self.total = plan, head, total
        self.parts: list[Part] = []
        self.stats_workspace: Tensor | None = None

    def chunks(self, num_active: int, num_tokens: int) -> list[slice]:
        """Chunks of tokens in order, those with a gradient first."""
        size, passive = self.plan.stats_tokens, num_tokens - num_active
        self.stats_workspace = self.head.stats_workspace(min(size, max(num_active, passive)))
        return list(slices_of_runs([(num_active, size), (passive, size)]))

    def forward(self, chunk: Tokens, keep: bool) -> RowStats:
        """Statistics [C]; no logits are kept."""
        return self.head.stats_alone(chunk, self.stats_workspace)

    def backward(self, chunk: Tokens, stats: RowStats, coefs: RowCoefs) -> None:
        """Keep the rows that have a coefficient for `finish`. coefs: [C] each."""
        active = rows_with_gradient(coefs, look=self.plan.drops_inactive)
        if active is None:
            return
        if isinstance(active, Tensor):
            chunk, stats, coefs = chunk.at(active), stats.select(active), coefs.select(active)
        self.total.rows += len(chunk.targets)
        self.parts.append(Part(chunk, stats, coefs))

    def finish(self) -> Gradients:
        """The gradients, once all rows are in."""
        self.stats_workspace = None
        if self.parts:
            Blocks(self.plan, self.head, self.total, join_parts(self.parts)).add()
        self.total.finish()
        return self.total


class Blocks:
    """Adds the gradients of some rows to `total`."""

    def __init__(self, plan: Plan, head: Head, total: Gradients, part: Part) -> None:
        self.total, self.head, self.dtype = total, head, plan.stats_dtype
        self.tokens, self.stats, self.coefs = part.tokens, part.stats, part.coefs
        self.budget = budget = plan.budget
        count, width = len(self.tokens.targets), head.hidden.shape[1]
        held = budget.block_hidden_bytes // (width * head.hidden.element_size())
        self.block = min(count, max(64, min(held, budget.block_tokens)))
        held = budget.block_logits_bytes // (self.block * plan.logits_dtype.itemsize)
        most = budget.block_weight_bytes // (width * self.dtype.itemsize)
        held = max(64, min(held, most) // 64 * 64)
        self.slice = min(len(head.weight), held, plan.most_slice_rows or held)
        first = head.at(slice(self.slice))
        self.workspace = first.workspace(self.block)
        self.row_major = first.row_major_workspace(self.block)
        self.weight_sum = head.hidden.new_empty(self.slice, width, dtype=self.dtype)  # [S, H]

    def add(self) -> None:
        """Add all of them."""
        count, num_rows = len(self.tokens.targets), len(self.head.weight)
        in_place = self.total.hidden_sum(self.tokens.positions, self.dtype)
        sums, first_lent = ([in_place], num_rows) if in_place is not None else self._borrow()
        for some in slices(count, sum(map(len, sums)) or count):
            for piece in sums:
                piece.zero_()
            for rows in slices(num_rows, self.slice):
                self._add_slice(rows, some, sums, weight=rows.stop <= first_lent)
            if in_place is None:
                self._round(sums, some)
        for rows in slices(num_rows, self.slice):
            if rows.stop > first_lent:
                self._add_slice(rows, slice(0, count), None, weight=True)

    def _borrow(self) -> tuple[list[Tensor], int]:
        """Memory for the sum of hidden's gradient, and the first row of weight's that lends some.

        The memory is a list of pieces [tokens, H]. Each piece but the last holds whole blocks of
        tokens.
        """
        count, width = len(self.tokens.targets), self.head.hidden.shape[1]
        num_rows, dtype = len(self.head.weight), self.dtype
        if self.total.hidden is None:
            return [], num_rows
        token_bytes = width * dtype.itemsize
        held = max(1, self.budget.block_sum_bytes // (token_bytes * self.block)) * self.block
        own = self.weight_sum.new_empty(min(held, count), width)
        weight = self.total.make_weight().view(-1).view(torch.uint8)
        lent = min(count - len(own), len(weight) // token_bytes)
        start = (len(weight) - lent * token_bytes) // dtype.itemsize * dtype.itemsize
        borrowed = weight[start : start + lent * token_bytes].view(dtype).view(lent, width)
        one_set = len(own) + lent == count
        return [own, borrowed], start // (len(weight) // num_rows) if one_set else 0

    def _add_slice(
        self, rows: slice, some: slice, sums: list[Tensor] | None, *, weight: bool
    ) -> None:
        """Add the gradients of some tokens at a slice; without `sums`, the weight's alone."""
        head, total = self.head.at(rows), self.total
        weight_sum = self.weight_sum[: len(head.weight)].zero_() if weight else None
        for part in slices(some.stop - some.start, self.block):
            index = slice(some.start + part.start, some.start + part.stop)
            given = self._dlogits(head, rows, index, weight_alone=sums is None)
            dlogits, row_major, inputs = given
            if sums is not None:
                hidden = _at(sums, part)
                total.add_slice(dlogits, row_major, head.weight, head.lora, inputs, hidden, rows)
            if weight_sum is not None:
                self.head.plan.gemms.add_product(weight_sum, dlogits.T, inputs)
        if weight_sum is not None:
            total.make_weight()[rows] = weight_sum

    def _dlogits(
        self, head: Head, rows: slice, index: slice, *, weight_alone: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A block's gradient by logits, [C, S], its row-major form and its hidden states, [C, H].

        weight_alone: nothing is added to bias's gradient, and no row-major copy is made.
        """
        tokens = self.tokens.at(index).within(rows)
        inputs = take(head.hidden, tokens.positions)  # [C, H]
        tokens = replace(tokens, positions=slice(0, len(inputs)))
        head = replace(head, hidden=inputs)
        assert self.workspace is not None
        out = head.logits_in(self.workspace, len(inputs))
        row_major, bias_grad = (None, None) if weight_alone else (self.row_major, self.total.bias)
        if row_major is not None:
            row_major = row_major[: len(inputs), : len(head.weight)]
        if bias_grad is not None:
            bias_grad = bias_grad[rows]
        raw_logits = head.raw_logits(tokens, out)  # [C, S]
        stats, coefs = self.stats.select(index), self.coefs.select(index)
        dlogits = head.dlogits(tokens, raw_logits, stats, coefs, bias_grad, row_major=row_major)
        return dlogits, dlogits if row_major is None else row_major, inputs

    def _round(self, sums: list[Tensor], some: slice) -> None:
        start = some.start
        for piece in sums:
            part = slice(start, min(start + len(piece), some.stop))
            values = piece[: part.stop - part.start]
            self.total.set_hidden(part_of(self.tokens.positions, part), values)
            start = part.stop


def _at(sums: list[Tensor], part: slice) -> Tensor | None:
    """The sum, [tokens, H], of a block of tokens; None without sums."""
    start = part.start
    for piece in sums:
        if start < len(piece):
            return piece[start : start + part.stop - part.start]
        start -= len(piece)
    return None
