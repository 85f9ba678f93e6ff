"""From the loss's derivatives by rows to the gradients of the inputs, a chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aepo_kernels.chunks import (
    Head,
    Tokens,
    chunk_size,
    join_tokens,
    keeps_logits,
    slice_size,
    slices,
)
from aepo_kernels.gradients import Gradients
from aepo_kernels.problem import Problem, take
from aepo_kernels.rows import RowCoefs, RowStats
from aepo_kernels.sampling import sample_rows, variance_of


class GradientPass:
    """Takes rows with their coefficients and adds up gradients in `total`.

    most_rows: an upper bound of the rows to come. `rows` is the number of those that took part in
    GEMMs, `variance` what sampling them added.
    """

    def __init__(
        self, problem: Problem, head: Head, needs: tuple[bool, ...], most_rows: int
    ) -> None:
        self.problem, self.head = problem, head
        self.slice = slice_size(problem, needs[1], most_rows)
        once = self.slice is not None or most_rows <= chunk_size(problem)
        self.total = Gradients(problem, needs, written_once=once)
        self.rows = 0
        self.variance = torch.zeros((), dtype=head.dtype, device=head.hidden.device)
        self.later: list[tuple[Tokens, RowStats, RowCoefs]] = []
        self.logits: Tensor | None = None  # of the last of them

    def add(
        self, tokens: Tokens, products: Tensor | None, stats: RowStats, coefs: RowCoefs
    ) -> None:
        """Add rows, those with a coefficient alone; products are their raw logits, if still there.

        The logits may be overwritten; they have to last until `finish`, `forget_logits` or `add`.
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
            products = None if products is None else _keep_rows(products, active)
            tokens, stats, coefs = tokens.at(active), stats.select(active), coefs.select(active)
            keep_prob = None if keep_prob is None else keep_prob[active]
        self.rows += len(tokens.targets)
        if self.slice is not None:
            self.later.append((tokens, stats, coefs))
            self.logits = products if keeps_logits(self.problem, self.rows) else None
            return
        if products is not None:
            self._add_chunk(tokens, products, stats, coefs, keep_prob)
            return
        count, size = len(tokens.targets), chunk_size(self.problem)
        space = self.head.space(min(count, size))
        for index in slices(count, size):
            chunk = tokens.at(index)
            products = self.head.products(chunk, space)
            # A fused forward rounds its logits differently, or not at all: with its normaliser, the
            # probabilities of these would not add up to one.
            fused = self.head.fused
            part = self.head.stats(chunk, products) if fused else stats.select(index)
            some = None if keep_prob is None else keep_prob[index]
            self._add_chunk(chunk, products, part, coefs.select(index), some)
            del products  # or the next chunk's would stand beside them

    def forget_logits(self) -> None:
        """Logits given before may be overwritten from now on."""
        self.logits = None

    def finish(self) -> Gradients:
        """The gradients, once all rows are in."""
        if self.slice is not None and self.later:
            self._add_slices(self.slice)
        self.total.finish()
        return self.total

    def _add_slices(self, size: int) -> None:
        """Take all rows a slice of the vocabulary at a time: each of dweight's is written once."""
        tokens, stats, coefs = _join(self.later)
        inputs = take(self.head.hidden, tokens.positions)
        hidden = None
        if self.total.hidden is not None:
            hidden = torch.zeros_like(inputs, dtype=self.head.dtype)
        space = self.head.at(slice(size)).space(len(inputs))
        kept = 0 if self.logits is None else len(self.logits)
        made = slice(0, len(inputs) - kept)
        for rows in slices(self.head.weight.shape[0], size):
            head, bias = self.head.at(rows), self.total.bias
            inside = (tokens.targets >= rows.start) & (tokens.targets < rows.stop)
            local = replace(tokens, targets=torch.where(inside, tokens.targets - rows.start, -1))
            bias_grad = None if bias is None else bias[rows]
            products = head.products(local.at(made), space)
            if self.logits is not None:
                assert space is not None
                products = space[: len(inputs) * len(head.weight)].view(len(inputs), -1)
                products[made.stop :] = self.logits[:, rows]
            dlogits = head.dlogits(local, products, stats, coefs, bias_grad)
            self.total.add_slice(dlogits, head.weight, head.lora, inputs, hidden, rows)
            del dlogits
        if self.total.hidden is not None and hidden is not None:
            self.total.hidden[tokens.positions] = hidden.to(self.total.hidden.dtype)

    def _add_chunk(
        self,
        tokens: Tokens,
        products: Tensor,
        stats: RowStats,
        coefs: RowCoefs,
        keep_prob: Tensor | None,
    ) -> None:
        dlogits = self.head.dlogits(tokens, products, stats, coefs, self.total.bias)
        inputs = take(self.head.hidden, tokens.positions)
        self.total.add(dlogits, self.head.weight, self.head.lora, inputs, tokens.positions)
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


def _keep_rows(products: Tensor, active: Tensor) -> Tensor:
    """products[active], on a CPU at the front of the same memory; active is ascending."""
    if products.is_cuda:
        return products.index_select(0, active)
    for new, old in enumerate(active.tolist()):
        if new != old:
            products[new] = products[old]
    return products[: len(active)]


def _join(parts: list[tuple[Tokens, RowStats, RowCoefs]]) -> tuple[Tokens, RowStats, RowCoefs]:
    tokens, stats, coefs = zip(*parts, strict=True)
    num_rows = [len(part.targets) for part in tokens]
    columns = [_cat(column, num_rows) for column in zip(*stats, strict=True)]
    joined = [_cat(column, num_rows) for column in zip(*coefs, strict=True)]
    return join_tokens(tokens), RowStats(*columns), RowCoefs(*joined)  # type: ignore[arg-type]


def _cat(column: Sequence[Tensor | None], num_rows: list[int]) -> Tensor | None:
    """One column of several parts; a part without it has zeros."""
    known = [x for x in column if x is not None]
    if not known:
        return None
    return torch.cat(
        [known[0].new_zeros(n) if x is None else x for x, n in zip(column, num_rows, strict=True)]
    )
