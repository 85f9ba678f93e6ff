"""Gradients of so many tokens that a float32 sum of hidden's would be large, on a CPU.

Logits are made by blocks: some tokens by some rows of the vocabulary. What of hidden's sum is more
than a budget lies in the gradient of the weight's last rows and is rounded before those are
written: the logits of those rows alone are made once more. Memory beside the gradients has a bound
at any N and V.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aepo_kernels.gemm import add_product
from aepo_kernels.head.accumulators import Gradients
from aepo_kernels.head.projection import Head
from aepo_kernels.head.tokens import Tokens
from aepo_kernels.ranges import part_of, slices, take
from aepo_kernels.rows.interface import RowCoefs, RowStats

# Bytes of a block's logits, of its hidden states, and of a slice of the weight's gradient.
_LOGITS_BYTES, _HIDDEN_BYTES, _WEIGHT_BYTES = 2**24, 2**23, 2**23
_BLOCK_TOKENS = 1024
# Bytes of the sum of hidden's gradient that nobody lends.
_SUM_BYTES = 20 * 2**20


class GradientBlocks:
    """Adds to `total` what tokens with these statistics and coefficients give.

    most_rows: of the weight at a time; None is what the memory budget holds.
    """

    def __init__(
        self,
        total: Gradients,
        head: Head,
        tokens: Tokens,
        stats: RowStats,
        coefs: RowCoefs,
        most_rows: int | None,
    ) -> None:
        self.total, self.head = total, head
        self.tokens, self.stats, self.coefs = tokens, stats, coefs
        count, width = len(tokens.targets), head.hidden.shape[1]
        held = _HIDDEN_BYTES // (width * head.hidden.element_size())
        self.block = min(count, max(64, min(held, _BLOCK_TOKENS)))
        held = _LOGITS_BYTES // (self.block * head.logits_dtype.itemsize)
        held = max(64, min(held, _WEIGHT_BYTES // (width * head.dtype.itemsize)) // 64 * 64)
        self.slice = min(len(head.weight), held, most_rows or held)
        first = head.at(slice(self.slice))
        self.space = first.space(self.block)
        self.by_rows = first.by_rows_space(self.block)
        self.weight_sum = head.hidden.new_empty(self.slice, width, dtype=head.dtype)

    def add(self) -> None:
        """Add all of them."""
        count, num_rows = len(self.tokens.targets), len(self.head.weight)
        in_place = self.total.hidden_sum(self.tokens.positions, self.head.dtype)
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
        """Where hidden's gradient is added up, and the first row of the weight's that lends memory.

        All pieces but the last are for whole blocks of tokens.
        """
        count, width = len(self.tokens.targets), self.head.hidden.shape[1]
        num_rows, dtype = len(self.head.weight), self.head.dtype
        if self.total.hidden is None:
            return [], num_rows
        token_bytes = width * dtype.itemsize
        held = max(1, _SUM_BYTES // (token_bytes * self.block)) * self.block
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
        """Some tokens at a slice of the vocabulary; without `sums`, to the weight's alone."""
        head, total = self.head.at(rows), self.total
        weight_sum = self.weight_sum[: len(head.weight)].zero_() if weight else None
        for part in slices(some.stop - some.start, self.block):
            index = slice(some.start + part.start, some.start + part.stop)
            given = self._dlogits(head, rows, index, weight_alone=sums is None)
            dlogits, by_rows, inputs = given
            if sums is not None:
                hidden = _at(sums, part)
                total.add_slice(dlogits, by_rows, head.weight, head.lora, inputs, hidden, rows)
            if weight_sum is not None:
                add_product(weight_sum, dlogits.T, inputs)
        if weight_sum is not None:
            total.make_weight()[rows] = weight_sum

    def _dlogits(
        self, head: Head, rows: slice, index: slice, *, weight_alone: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A block's gradient by the logits, the same by rows, and its hidden states.

        weight_alone: neither adds to bias's gradient nor lays the logits' out by rows.
        """
        tokens = self.tokens.at(index).within(rows)
        inputs = take(head.hidden, tokens.positions)
        tokens = replace(tokens, positions=slice(0, len(inputs)))
        head = replace(head, hidden=inputs)
        assert self.space is not None
        out = head.logits_in(self.space, len(inputs))
        by_rows, bias_grad = (None, None) if weight_alone else (self.by_rows, self.total.bias)
        if by_rows is not None:
            by_rows = by_rows[: len(inputs), : len(head.weight)]
        if bias_grad is not None:
            bias_grad = bias_grad[rows]
        products = head.products(tokens, out)
        stats, coefs = self.stats.select(index), self.coefs.select(index)
        dlogits = head.dlogits(tokens, products, stats, coefs, bias_grad, by_rows=by_rows)
        return dlogits, dlogits if by_rows is None else by_rows, inputs

    def _round(self, sums: list[Tensor], some: slice) -> None:
        start = some.start
        for piece in sums:
            part = slice(start, min(start + len(piece), some.stop))
            values = piece[: part.stop - part.start]
            self.total.set_hidden(part_of(self.tokens.positions, part), values)
            start = part.stop


def _at(sums: list[Tensor], part: slice) -> Tensor | None:
    """The sums of a block of tokens, or None where there are none."""
    start = part.start
    for piece in sums:
        if start < len(piece):
            return piece[start : start + part.stop - part.start]
        start -= len(piece)
    return None
