"""From the loss's derivatives by rows to the gradients of the inputs, a chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from aepo_kernels.head.accumulators import Gradients
from aepo_kernels.head.block_pass import GradientBlocks
from aepo_kernels.head.plan import (
    forward_chunk_size,
    goes_by_blocks,
    gradient_chunk_size,
    keeps_logits,
    slice_size,
    waiting_as_float16,
)
from aepo_kernels.head.projection import Head
from aepo_kernels.head.row_sampling import sample_rows, variance_of
from aepo_kernels.head.stashed_logits import SlicedLogits
from aepo_kernels.head.tokens import Tokens, join_tokens
from aepo_kernels.problem import Problem
from aepo_kernels.ranges import slices, take
from aepo_kernels.rows.interface import RowCoefs, RowStats


@dataclass(frozen=True)
class _Part:
    """Rows for slices of the vocabulary, with their logits where those are still there."""

    tokens: Tokens
    stats: RowStats
    coefs: RowCoefs
    logits: Tensor | SlicedLogits | None

    def dlogits(
        self,
        head: Head,
        rows: slice,
        out: Tensor | None,
        bias_grad: Tensor | None,
        by_rows: Tensor | None,
    ) -> Tensor:
        """The gradient by the logits at a slice of the vocabulary, in `out` where there is one."""
        local, more = self.tokens.within(rows), dict[str, Tensor]()
        if isinstance(self.logits, Tensor):
            products = self.logits[:, rows]
        elif self.logits is not None:
            assert out is not None
            products, more = self.logits.read(rows, out)
        else:
            products = head.products(local, out)
        given = local, products, self.stats, self.coefs, bias_grad
        return head.dlogits(*given, out, by_rows, **more)


class GradientPass:
    """Takes rows with their coefficients and adds up gradients in `total`.

    most_rows: an upper bound of the rows to come. `size` is that of a chunk, `rows` the number of
    rows that took part in GEMMs, `variance` what sampling them added.
    """

    def __init__(
        self, problem: Problem, head: Head, needs: tuple[bool, ...], most_rows: int
    ) -> None:
        self.problem, self.head = problem, head
        self.slice = slice_size(problem, needs[1], most_rows)
        self.blocks = self.slice is not None and needs[1] and goes_by_blocks(problem, most_rows)
        self.size = gradient_chunk_size(problem, needs[1], most_rows)
        most = min(self.size, forward_chunk_size(problem)) if head.fused else self.size
        once = self.slice is not None or most_rows <= most  # that many rows come at a time
        self.total = Gradients(problem, needs, written_once=once)
        self.rows = 0
        self.variance = torch.zeros((), dtype=head.dtype, device=head.hidden.device)
        self.later: list[_Part] = []
        self.scratch = 0  # numbers that slices work in, where there is `space` for them
        self.space: Tensor | None = None
        self.by_rows: Tensor | None = None

    def rooms(self, tokens: int) -> list[SlicedLogits]:
        """Where logits of the first of so many tokens can wait; to be asked once, first.

        Widened logits wait as float16 where those of all tokens would not fit.
        """
        wanted = self.total.needs_weight and not self.blocks and self.head.by_slices
        if self.slice is None or not wanted:
            return []
        weight, dtype = self.problem.weight, self.head.logits_dtype
        inside, beside = waiting_as_float16(self.problem, tokens)
        if inside:
            dtype, self.scratch = torch.float16, tokens * min(self.slice, len(weight))
        if weight.shape[1] * weight.element_size() % dtype.itemsize != 0:
            return []
        memories = [self.total.make_weight().view(dtype)]
        if beside:
            memories.append(weight.new_empty(len(weight), beside, dtype=dtype))
        rooms = []
        for memory in memories:
            rooms.append(
                SlicedLogits.in_memory(memory, tokens, self.slice, by_columns=self.head.by_columns)
            )
            tokens -= rooms[-1].tokens
        return rooms

    def first_used(self, start: int, stop: int, size: int) -> int:
        """Of tokens start to stop, the first one whose logits `add` has a use for.

        size: tokens whose logits can last. Slices of the vocabulary make the others again, so that
        statistics are all that is wanted of those.
        """
        if self.slice is None:
            return start
        lasts = self.scratch == 0 and keeps_logits(self.problem, stop)
        return max(start, stop - size) if lasts else stop

    def add(
        self,
        tokens: Tokens,
        products: Tensor | SlicedLogits | None,
        stats: RowStats,
        coefs: RowCoefs,
    ) -> None:
        """Add rows, those with a coefficient alone; products are their raw logits, if still there.

        The logits may be overwritten; a tensor of them has to last until `finish`, `forget_logits`
        or `add`.
        """
        self.forget_logits()
        keep_prob = None
        sampling = self.problem.row_sampling
        if sampling is not None:
            coefs, keep_prob = sample_rows(stats, coefs, sampling)
        active = _active_rows(coefs, tokens, look=sampling is not None)
        if active is None:
            return
        if isinstance(active, Tensor):
            products = None if products is None else _pick(products, active)
            tokens, stats, coefs = tokens.at(active), stats.select(active), coefs.select(active)
            keep_prob = None if keep_prob is None else keep_prob[active]
        self.rows += len(tokens.targets)
        if self.slice is not None:
            self.later.append(_Part(tokens, stats, coefs, products))
            return
        assert not isinstance(products, SlicedLogits)
        if products is not None:
            self._add_chunk(tokens, products, stats, coefs, keep_prob)
            return
        count, size = len(tokens.targets), self.size
        space = self.head.space(min(count, size))
        for index in slices(count, size):
            chunk = tokens.at(index)
            out = None if space is None else self.head.logits_in(space, len(chunk.targets))
            products = self.head.products(chunk, out)
            # A fused forward rounds its logits differently, or not at all: with its normaliser, the
            # probabilities of these would not add up to one.
            fused = self.head.fused
            part = self.head.stats(chunk, products) if fused else stats.select(index)
            some = None if keep_prob is None else keep_prob[index]
            self._add_chunk(chunk, products, part, coefs.select(index), some)
            del products  # or the next chunk's would stand beside them

    def forget_logits(self) -> None:
        """Logits given before may be overwritten from now on."""
        if self.later and isinstance(self.later[-1].logits, Tensor):
            self.later[-1] = replace(self.later[-1], logits=None)

    def finish(self) -> Gradients:
        """The gradients, once all rows are in."""
        if self.later and (self.blocks or self._picks_many()):
            self.space = None  # nothing that slices would need is left beside the blocks
            part, most_rows = _join(self.later), self.problem.weight_slice
            given = part.tokens, part.stats, part.coefs
            GradientBlocks(self.total, self.head, *given, most_rows).add()
        elif self.later and self.slice is not None:
            self._add_slices(self.slice)
        elif self.slice is not None:
            self.total.weight = None  # nothing but room
        self.total.finish()
        return self.total

    def _picks_many(self) -> bool:
        positions = join_tokens([part.tokens for part in self.later]).positions
        if isinstance(positions, slice) or not self.total.needs_weight:
            return False
        return goes_by_blocks(self.problem, len(positions), picked=True)

    def _add_slices(self, size: int) -> None:
        """Take all rows a slice of the vocabulary at a time: each of dweight's is written once."""
        # Neighbours without logits make them in one GEMM.
        parts = [_join(list(few)) for _, few in groupby(self.later, lambda part: id(part.logits))]
        count = sum(len(part.tokens.targets) for part in parts)
        first = self.head.at(slice(size))
        # First of all: what scoring has left is as large, and malloc may not have given it back.
        space = first.space(count) if self.space is None else self.space
        second_space = first.by_rows_space(count)
        positions = join_tokens([part.tokens for part in parts]).positions
        inputs = take(self.head.hidden, positions)
        whole = replace(self.head, hidden=inputs)  # or every slice would pick the rows again
        parts = _side_by_side(parts)
        hidden = in_place = self.total.hidden_sum(positions, self.head.dtype)
        if in_place is None and self.total.hidden is not None:
            hidden = torch.zeros_like(inputs, dtype=self.head.dtype)
        for rows in slices(self.head.weight.shape[0], size):
            head, bias = whole.at(rows), self.total.bias
            bias_grad = None if bias is None else bias[rows]
            by_rows = None if second_space is None else second_space[:, : len(head.weight)]
            if space is None:
                (part,) = parts
                dlogits = part.dlogits(head, rows, None, bias_grad, by_rows)
            else:
                dlogits = head.logits_in(space, count)
                for part in parts:
                    some = part.tokens.positions
                    copy = None if by_rows is None else by_rows[some]
                    part.dlogits(head, rows, dlogits[some], bias_grad, copy)
            by_rows = dlogits if by_rows is None else by_rows
            self.total.set_weight(dlogits, inputs, rows)
            self.total.add_slice(dlogits, by_rows, head.weight, head.lora, inputs, hidden, rows)
            del dlogits, by_rows  # which may be views of `space`
        del space, second_space
        if in_place is None and hidden is not None:
            self.total.set_hidden(positions, hidden)

    def _add_chunk(
        self,
        tokens: Tokens,
        products: Tensor,
        stats: RowStats,
        coefs: RowCoefs,
        keep_prob: Tensor | None,
    ) -> None:
        count, total = len(tokens.targets), self.total
        if self.by_rows is None or len(self.by_rows) < count:
            self.by_rows = self.head.by_rows_space(count)
        by_rows = None if self.by_rows is None else self.by_rows[:count]
        dlogits = self.head.dlogits(tokens, products, stats, coefs, total.bias, by_rows=by_rows)
        by_rows = dlogits if by_rows is None else by_rows
        inputs = take(self.head.hidden, tokens.positions)
        total.add(dlogits, by_rows, self.head.weight, self.head.lora, inputs, tokens.positions)
        if keep_prob is not None:
            self.variance += variance_of(dlogits, keep_prob)


def _active_rows(coefs: RowCoefs, tokens: Tokens, *, look: bool) -> Tensor | slice | None:
    """Rows with a coefficient that is not zero, or None if there are none.

    On CUDA that is every row unless one is to `look`: finding out waits for the device, so there
    the caller says which tokens are active.
    """
    known = [coef for coef in coefs if coef is not None]
    if not known or not len(tokens.targets):
        return None
    if known[0].device.type != "cpu" and not look:
        return slice(None)
    active = torch.stack([coef != 0 for coef in known]).any(0).nonzero().squeeze(1)
    if not len(active):
        return None
    return slice(None) if len(active) == len(tokens.targets) else active


def _pick(products: Tensor | SlicedLogits, active: Tensor) -> Tensor | SlicedLogits:
    """products[active], on a CPU at the front of the same memory; active is ascending."""
    if isinstance(products, SlicedLogits):
        return replace(products, picked=active)
    if products.is_cuda:
        return products.index_select(0, active)
    if products.stride(0) == 1 and products.stride(1) > 1:  # by columns
        return products.T.index_select(1, active).T
    for new, old in enumerate(active.tolist()):
        if new != old:
            products[new] = products[old]
    return products[: len(active)]


def _side_by_side(parts: list[_Part]) -> list[_Part]:
    """The same for inputs that hold the parts' rows one part after the other."""
    start, placed = 0, []
    for part in parts:
        rows = slice(start, start + len(part.tokens.targets))
        placed.append(replace(part, tokens=replace(part.tokens, positions=rows)))
        start = rows.stop
    return placed


def _join(parts: list[_Part]) -> _Part:
    if len(parts) == 1:
        return parts[0]
    num_rows = [len(part.tokens.targets) for part in parts]
    stats = [_cat(column, num_rows) for column in zip(*(part.stats for part in parts), strict=True)]
    coefs = [_cat(column, num_rows) for column in zip(*(part.coefs for part in parts), strict=True)]
    tokens = join_tokens([part.tokens for part in parts])
    return _Part(tokens, RowStats(*stats), RowCoefs(*coefs), None)  # type: ignore[arg-type]


def _cat(column: Sequence[Tensor | None], num_rows: list[int]) -> Tensor | None:
    """One column of several parts; a part without it has zeros."""
    known = [x for x in column if x is not None]
    if not known:
        return None
    return torch.cat(
        [known[0].new_zeros(n) if x is None else x for x, n in zip(column, num_rows, strict=True)]
    )
