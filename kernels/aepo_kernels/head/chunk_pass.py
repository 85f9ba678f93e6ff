"""Gradients by chunks of tokens: logits become their own gradient, and two GEMMs follow."""

from __future__ import annotations

import torch
from torch import Tensor

from aepo_kernels.head.accumulators import Gradients
from aepo_kernels.head.gradient_scale import gradient_scale
from aepo_kernels.head.plan import Plan
from aepo_kernels.head.projection import Head
from aepo_kernels.head.row_sampling import rows_with_gradient, sample_rows, variance_of
from aepo_kernels.head.tokens import Tokens
from aepo_kernels.problem import RowSampling
from aepo_kernels.ranges import slices, slices_of_runs, take
from aepo_kernels.rows.interface import RowCoefs, RowStats


class ChunkPass:
    """Adds each chunk's gradients to `total` as soon as its coefficients are known.

    The only pass on a GPU unless the caller asks for slices, and the only one that samples rows.
    """

    def __init__(
        self, plan: Plan, head: Head, total: Gradients, sampling: RowSampling | None
    ) -> None:
        self.plan, self.head, self.total, self.sampling = plan, head, total, sampling
        self.logits: Tensor | None = None  # [C, V] of the chunk between forward and backward
        self.workspace: Tensor | None = None
        self.stats_workspace: Tensor | None = None
        self.row_major: Tensor | None = None

    def chunks(self, num_active: int, num_tokens: int) -> list[slice]:
        """Chunks of tokens in order, those with a gradient first."""
        plan, passive = self.plan, num_tokens - num_active
        self.workspace = self.head.workspace(min(plan.forward_tokens, num_active))
        self.stats_workspace = self.head.stats_workspace(min(plan.stats_tokens, passive))
        runs = (num_active, plan.forward_tokens), (passive, plan.stats_tokens)
        return list(slices_of_runs(runs))

    def forward(self, chunk: Tokens, keep: bool) -> RowStats:
        """Statistics [C]; keep: the logits stay for `backward`, which comes next."""
        if not keep:
            return self.head.stats_alone(chunk, self.stats_workspace)
        self.logits, stats = self.head.forward(chunk, self.workspace)
        return stats

    def backward(self, chunk: Tokens, stats: RowStats, coefs: RowCoefs) -> None:
        """Add the gradients of rows with a coefficient, [C] each; make missing logits again."""
        logits, self.logits = self.logits, None
        keep_prob = None  # [C]
        if self.sampling is not None:
            coefs, keep_prob = sample_rows(stats, coefs, self.sampling)
        active = rows_with_gradient(coefs, look=self.plan.drops_inactive)
        if active is None:
            return
        if isinstance(active, Tensor):
            if logits is not None:
                logits = pick_rows(logits, active, in_place=self.plan.reuses_memory)
            chunk, stats, coefs = chunk.at(active), stats.select(active), coefs.select(active)
            keep_prob = None if keep_prob is None else keep_prob[active]
        self.total.rows += len(chunk.targets)
        if logits is None:
            self._recompute(chunk, stats, coefs, keep_prob)
        else:
            self._add(chunk, logits, stats, coefs, keep_prob)

    def finish(self) -> Gradients:
        """The gradients, once all rows are in."""
        self.workspace = self.stats_workspace = None
        self.total.finish()
        return self.total

    def _recompute(
        self, tokens: Tokens, stats: RowStats, coefs: RowCoefs, keep_prob: Tensor | None
    ) -> None:
        """Make the logits of some tokens again, chunk by chunk, and add the gradients."""
        count, size, head = len(tokens.targets), self.plan.gradient_tokens, self.head
        workspace = head.workspace(min(count, size))
        for index in slices(count, size):
            chunk = tokens.at(index)
            out = None if workspace is None else head.logits_in(workspace, len(chunk.targets))
            logits = head.raw_logits(chunk, out)  # [C, V]
            # A fused forward rounds logits differently, or not at all. With its normaliser, the
            # probabilities of these logits would not add up to one.
            part = head.stats(chunk, logits) if self.plan.fused else stats.select(index)
            some = None if keep_prob is None else keep_prob[index]
            self._add(chunk, logits, part, coefs.select(index), some)
            del logits  # or the next chunk's logits would exist beside them

    def _add(
        self,
        tokens: Tokens,
        logits: Tensor,
        stats: RowStats,
        coefs: RowCoefs,
        keep_prob: Tensor | None,
    ) -> None:
        """Gradients of a chunk from its logits [C, V], which are overwritten."""
        count, head, total = len(tokens.targets), self.head, self.total
        if self.row_major is None or len(self.row_major) < count:
            self.row_major = head.row_major_workspace(count)
        row_major = None if self.row_major is None else self.row_major[:count]
        unscale, bias_grad = None, total.bias
        if self.plan.scales_gradient:
            scale = gradient_scale(head, tokens, stats, coefs)
            coefs, unscale = coefs.times(scale), scale.reciprocal()
            bias_grad = None if total.bias is None else torch.zeros_like(total.bias)
        dlogits = head.dlogits(tokens, logits, stats, coefs, bias_grad, row_major=row_major)
        row_major = dlogits if row_major is None else row_major  # [C, V]
        inputs = take(head.hidden, tokens.positions)  # [C, H]
        total.add(dlogits, row_major, head.weight, head.lora, inputs, tokens.positions, unscale)
        if unscale is not None and total.bias is not None and bias_grad is not None:
            total.bias.addcmul_(bias_grad, unscale)
        if keep_prob is not None:
            variance = variance_of(dlogits, keep_prob, few=self.plan.reuses_memory)
            total.variance += variance if unscale is None else variance * unscale.square()


def pick_rows(logits: Tensor, active: Tensor, *, in_place: bool) -> Tensor:
    """logits[active], [A, V]. active: [A], ascending. in_place: at the front of the same memory."""
    if not in_place:
        return logits.index_select(0, active)
    if logits.stride(0) == 1 and logits.stride(1) > 1:  # column-major
        return logits.T.index_select(1, active).T
    for new, old in enumerate(active.tolist()):
        if new != old:
            logits[new] = logits[old]
    return logits[: len(active)]
