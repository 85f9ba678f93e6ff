"""Gradients by slices of the vocabulary, for all tokens at once: each weight row is written once.

Raw logits are stashed for their slice as far as memory allows. All other logits are made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from aepo_kernels.head.accumulators import Gradients
from aepo_kernels.head.block_pass import Blocks
from aepo_kernels.head.chunk_pass import pick_rows
from aepo_kernels.head.parts import Part, join_parts
from aepo_kernels.head.plan import Plan
from aepo_kernels.head.projection import Head
from aepo_kernels.head.row_sampling import rows_with_gradient
from aepo_kernels.head.stashed_logits import StashedLogits
from aepo_kernels.head.tokens import Tokens, join_tokens
from aepo_kernels.ranges import slices, slices_of_runs, take
from aepo_kernels.rows.interface import RowCoefs, RowStats


class SlicePass:
    """Keeps rows until `finish`, which adds their gradients to `total` by slices."""

    def __init__(self, plan: Plan, head: Head, total: Gradients) -> None:
        self.plan, self.head, self.total = plan, head, total
        self.parts: list[Part] = []
        self.logits: Tensor | StashedLogits | None = None  # of the chunk that `backward` gets next
        self.stashes: Iterator[StashedLogits] = iter(())
        self.seen = 0  # tokens that went through `forward`
        self.num_stashed = self.first_kept = 0  # tokens from `first_kept` on keep their logits
        self.workspace: Tensor | None = None
        self.stats_workspace: Tensor | None = None

    def chunks(self, num_active: int, num_tokens: int) -> list[slice]:
        """Chunks of tokens in order: stashed, statistics alone, logits kept, without a gradient."""
        plan, passive = self.plan, num_tokens - num_active
        stashes = self._make_stashes(num_active)
        self.stashes = iter(stashes)
        self.num_stashed = sum(stash.tokens for stash in stashes)
        self.first_kept = num_active
        if plan.keeps_last:
            self.first_kept = max(self.num_stashed, num_active - plan.gradient_tokens)
        kept = num_active - self.first_kept
        self.workspace = self.head.workspace(min(plan.gradient_tokens, kept))
        alone = self.first_kept - self.num_stashed
        most = min(plan.stats_tokens, max(alone, passive))
        self.stats_workspace = self.head.stats_workspace(most, self._slice_numbers(num_active))
        runs = [(stash.tokens, stash.tokens) for stash in stashes]
        runs += [(alone, plan.stats_tokens), (kept, plan.gradient_tokens)]
        runs += [(passive, plan.stats_tokens)]
        return list(slices_of_runs(runs))

    def forward(self, chunk: Tokens, keep: bool) -> RowStats:
        """Statistics [C]; keep: `backward` comes next."""
        start, self.logits = self.seen, None
        self.seen += len(chunk.targets)
        if start < self.num_stashed:
            self.logits = stash = next(self.stashes)
            return self.head.stash_logits(stash, chunk, self.stats_workspace)
        if keep and start >= self.first_kept:
            self.logits, stats = self.head.forward(chunk, self.workspace)
            return stats
        return self.head.stats_alone(chunk, self.stats_workspace)

    def backward(self, chunk: Tokens, stats: RowStats, coefs: RowCoefs) -> None:
        """Keep the rows that have a coefficient for `finish`. coefs: [C] each."""
        logits, self.logits = self.logits, None
        active = rows_with_gradient(coefs, look=self.plan.drops_inactive)
        if active is None:
            return
        if isinstance(active, Tensor):
            if isinstance(logits, StashedLogits):
                logits = replace(logits, picked=active)
            elif logits is not None:
                logits = pick_rows(logits, active, in_place=True)
            chunk, stats, coefs = chunk.at(active), stats.select(active), coefs.select(active)
        self.total.rows += len(chunk.targets)
        self.parts.append(Part(chunk, stats, coefs, logits))

    def finish(self) -> Gradients:
        """The gradients, once all rows are in."""
        workspace = self.stats_workspace if self._is_float16() else None
        self.workspace = self.stats_workspace = None
        if not self.parts:
            self.total.weight = None  # a stash at most
        elif self._picks_too_many():
            workspace = None  # nothing that slices would need is left beside the blocks
            Blocks(self.plan, self.head, self.total, join_parts(self.parts)).add()
        else:
            self._add_slices(workspace)
        self.total.finish()
        return self.total

    def _make_stashes(self, tokens: int) -> list[StashedLogits]:
        """Stashes for logits of the first tokens, of so many in all."""
        plan, weight = self.plan, self.total.weight_shape
        if plan.stash is None:
            return []
        memories = [self.total.make_weight().view(plan.stash.dtype)]  # [V, M]
        if plan.stash.beside:
            shape = weight[0], plan.stash.beside
            memories.append(self.head.hidden.new_empty(shape, dtype=plan.stash.dtype))
        stashes, layout = [], plan.column_major
        for memory in memories:
            made = StashedLogits.in_memory(memory, tokens, plan.slice_rows, column_major=layout)
            stashes.append(made)
            tokens -= made.tokens
        return stashes

    def _is_float16(self) -> bool:
        return self.plan.stash is not None and self.plan.stash.dtype == torch.float16

    def _slice_numbers(self, tokens: int) -> int:
        """Size of the workspace that `_add_slices` takes over with a float16 stash; 0 without."""
        rows = min(self.plan.slice_rows, len(self.head.weight))
        return tokens * rows if self._is_float16() else 0

    def _picks_too_many(self) -> bool:
        positions = join_tokens([part.tokens for part in self.parts]).positions
        if isinstance(positions, slice) or self.plan.most_picked is None:
            return False
        return len(positions) > self.plan.most_picked

    def _add_slices(self, workspace: Tensor | None) -> None:
        """Take all rows, [A, V], a slice of the vocabulary at a time."""
        # Neighbours without logits make them in one GEMM.
        parts = [join_parts(list(few)) for _, few in groupby(self.parts, lambda x: id(x.logits))]
        count, size = sum(len(part.tokens.targets) for part in parts), self.plan.slice_rows
        first, total = self.head.at(slice(size)), self.total
        # This allocation comes first: memory that the statistics freed has the same size, and
        # malloc may still hold it.
        workspace = first.workspace(count) if workspace is None else workspace
        copies = first.row_major_workspace(count)
        positions = join_tokens([part.tokens for part in parts]).positions
        inputs = take(self.head.hidden, positions)  # [A, H]
        whole = replace(self.head, hidden=inputs)  # or every slice would pick the rows again
        parts = _side_by_side(parts)
        hidden = in_place = total.hidden_sum(positions, self.plan.stats_dtype)  # [A, H]
        if in_place is None and total.hidden is not None:
            hidden = torch.zeros_like(inputs, dtype=self.plan.stats_dtype)
        for rows in slices(len(self.head.weight), size):
            head = whole.at(rows)
            bias_grad = None if total.bias is None else total.bias[rows]
            row_major = None if copies is None else copies[:, : len(head.weight)]  # [A, S]
            if workspace is None:
                (part,) = parts
                dlogits = _dlogits(part, head, rows, None, bias_grad, row_major)  # [A, S]
            else:
                dlogits = head.logits_in(workspace, count)  # [A, S]
                for part in parts:
                    some = part.tokens.positions
                    copy = None if row_major is None else row_major[some]
                    _dlogits(part, head, rows, dlogits[some], bias_grad, copy)
            row_major = dlogits if row_major is None else row_major
            total.set_weight(dlogits, inputs, rows)
            total.add_slice(dlogits, row_major, head.weight, head.lora, inputs, hidden, rows)
            del dlogits, row_major  # both may be views of the workspace
        del workspace, copies
        if in_place is None and hidden is not None:
            total.set_hidden(positions, hidden)


def _dlogits(
    part: Part,
    head: Head,
    rows: slice,
    out: Tensor | None,
    bias_grad: Tensor | None,
    row_major: Tensor | None,
) -> Tensor:
    """The gradient by a slice's logits, [A, S], in `out` unless that is None."""
    local, more = part.tokens.within(rows), dict[str, Tensor]()
    if isinstance(part.logits, Tensor):
        raw_logits = part.logits[:, rows]
    elif part.logits is not None:
        assert out is not None
        raw_logits, more = part.logits.read(rows, out)
    else:
        raw_logits = head.raw_logits(local, out)
    given = local, raw_logits, part.stats, part.coefs, bias_grad
    return head.dlogits(*given, out, row_major, **more)


def _side_by_side(parts: list[Part]) -> list[Part]:
    """The parts with positions in inputs that hold one part's rows after the other's."""
    start, placed = 0, []
    for part in parts:
        rows = slice(start, start + len(part.tokens.targets))
        placed.append(replace(part, tokens=replace(part.tokens, positions=rows)))
        start = rows.stop
    return placed
