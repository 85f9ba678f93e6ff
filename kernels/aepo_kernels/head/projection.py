"""The head: GEMM 1, from hidden states to raw logits, and the row operations on raw logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aepo_kernels.cpu import rows as cpu_rows
from aepo_kernels.head.plan import Plan
from aepo_kernels.head.sharding import combine
from aepo_kernels.head.stashed_logits import StashedLogits, logits_in
from aepo_kernels.head.tokens import Tokens
from aepo_kernels.problem import Problem, VocabShard
from aepo_kernels.ranges import slices, take
from aepo_kernels.rows.interface import LogitMap, RowCoefs, RowStats


@dataclass(frozen=True)
class Head:
    """The head's tensors, cast once, and the plan by which they are multiplied.

    hidden: [N, H]. weight: [V, H] in hidden's dtype. lora: (A [R, H], B [V, R]) in hidden's dtype.
    squares: sums of squared probabilities are wanted. logit_stats: sums of logits are wanted, and
    whether the target has the largest one.
    """

    plan: Plan
    hidden: Tensor
    weight: Tensor
    logit_map: LogitMap
    lora: tuple[Tensor, Tensor] | None
    lora_scale: float
    shard: VocabShard | None
    squares: bool
    logit_stats: bool

    def workspace(self, tokens: int) -> Tensor | None:
        """Memory [tokens * V] for the logits of one chunk after the other; None on a GPU."""
        if not self.plan.reuses_memory or self.plan.fused:
            return None
        return self.hidden.new_empty(tokens * len(self.weight), dtype=self.plan.logits_dtype)

    def row_major_workspace(self, tokens: int) -> Tensor | None:
        """Memory [tokens, V] for a row-major copy of the logits' gradient, or None.

        Only a column-major gradient needs the copy.
        """
        if not self.plan.column_major:
            return None
        width = len(self.weight)
        # Rows a power of two apart would fall into the same few lines of the cache. oneDNN
        # multiplies up to 31 numbers beyond each row by zero, so these numbers must not be NaN.
        workspace = self.hidden.new_empty(tokens, width + 32)  # [C, V + 32]
        workspace[:, width:] = 0
        return workspace[:, :width]

    def stats_workspace(self, tokens: int, least: int = 0) -> Tensor | None:
        """Memory for `stats_alone` of so many tokens, or of `least` numbers if these are more."""
        if not self.plan.sliced_stats:
            return self.workspace(tokens)
        columns = min(self.plan.stats_columns, len(self.weight))
        return self.hidden.new_empty(max(tokens * columns, least), dtype=self.plan.logits_dtype)

    def logits_in(self, workspace: Tensor, tokens: int) -> Tensor:
        """The front of contiguous memory as logits [tokens, V], in the plan's layout."""
        column_major = self.plan.column_major
        return logits_in(workspace, tokens, len(self.weight), column_major=column_major)

    def forward(
        self, tokens: Tokens, workspace: Tensor | None = None
    ) -> tuple[Tensor | None, RowStats]:
        """Raw logits [C, V] of some tokens, or None with a fused forward; and statistics, [C] each.

        Logits in `workspace` last until the workspace is used again.
        """
        if self.plan.fused:
            return None, self._fused_stats(tokens)
        out = None if workspace is None else self.logits_in(workspace, len(tokens.targets))
        raw_logits = self.raw_logits(tokens, out)  # [C, V]
        return raw_logits, self.stats(tokens, raw_logits)

    def stats_alone(self, tokens: Tokens, workspace: Tensor | None) -> RowStats:
        """Statistics, [C] each, without logits that last: a CPU reads logits while cached."""
        if not self.plan.sliced_stats:
            return self.forward(tokens, workspace)[1]
        assert workspace is not None
        return self._sliced_stats(tokens, self.plan.stats_columns, workspace)

    def stash_logits(
        self, stash: StashedLogits, tokens: Tokens, workspace: Tensor | None
    ) -> RowStats:
        """Statistics, [C] each; the logits stay in `stash`.

        Logits for a float16 stash are made in `workspace` first.
        """
        return self._sliced_stats(tokens, stash.size, workspace, stash)

    def _sliced_stats(
        self,
        tokens: Tokens,
        size: int,
        workspace: Tensor | None,
        stash: StashedLogits | None = None,
    ) -> RowStats:
        count = len(self.weight)
        state, stats = cpu_rows.new_state(len(tokens.targets)), None
        for rows in slices(count, size):
            head, local = self.at(rows), tokens.within(rows)
            part: dict[str, Any] = {"is_first": rows.start == 0, "is_last": rows.stop == count}
            out, base = (None, None) if stash is None else stash.at(rows)  # [C, S], [C]
            if base is not None:
                part |= {"kept": out, "base": base}
            if out is None or base is not None:
                assert workspace is not None
                out = head.logits_in(workspace, len(local.targets))
            stats = head.row_stats(local, head.raw_logits(local, out), state=state, **part)
        assert stats is not None
        return self._whole(stats, tokens)

    def stats(self, tokens: Tokens, raw_logits: Tensor) -> RowStats:
        """Statistics, [C] each, of raw logits [C, V]; a shard's become those of whole rows."""
        return self._whole(self.row_stats(tokens, raw_logits), tokens)

    def row_stats(self, tokens: Tokens, raw_logits: Tensor, **part: Any) -> Any:
        """The row operation of that name; `part` is for slices of the columns."""
        return self.plan.row_ops.row_stats(
            raw_logits,
            tokens.targets,
            tokens.inv_temperature,
            tokens.second_inv_temperature,
            self.logit_map,
            self.plan.stats_dtype,
            squares=self.squares,
            logit_stats=self.logit_stats,
            **self.plan.row_options,
            **part,
        )

    def _whole(self, stats: RowStats, tokens: Tokens) -> RowStats:
        if self.shard is None:
            return stats
        temperatures = tokens.inv_temperature, tokens.second_inv_temperature
        return combine(stats, tokens.targets, *temperatures, self.shard)

    def at(self, rows: slice) -> Head:
        """The head of a slice of the vocabulary: weight [S, H]."""
        bias, lora = self.logit_map.bias, self.lora
        return replace(
            self,
            weight=self.weight[rows],
            logit_map=replace(self.logit_map, bias=None if bias is None else bias[rows]),
            lora=None if lora is None else (lora[0], lora[1][rows]),
        )

    def raw_logits(self, tokens: Tokens, out: Tensor | None = None) -> Tensor:
        """GEMM 1: the raw logits of some tokens, [C, V], in `out` [C, V] unless that is None."""
        inputs, dtype = take(self.hidden, tokens.positions), self.plan.logits_dtype  # [C, H]
        gemms = self.plan.gemms
        if self.plan.column_major:
            transposed = None if out is None else out.T  # [V, C]
            raw_logits = gemms.matmul(self.weight, inputs.T, dtype, out=transposed).T
        else:
            raw_logits = gemms.matmul(inputs, self.weight.T, dtype, out=out)
        if self.lora is not None:
            down, up = self.lora
            low_rank = gemms.matmul(inputs, down.T).mul_(self.lora_scale)  # [C, R]
            gemms.add_product(raw_logits, low_rank, up.T)
        return raw_logits

    def dlogits(
        self,
        tokens: Tokens,
        raw_logits: Tensor,
        stats: RowStats,
        coefs: RowCoefs,
        bias_grad: Tensor | None,
        out: Tensor | None = None,
        row_major: Tensor | None = None,
        **stashed: Tensor,
    ) -> Tensor:
        """The loss's gradient by the raw logits, [C, V] in hidden's dtype, or in place if upcast.

        bias_grad: [V], the gradient's column sums are added to it. row_major: [C, V] from
        `row_major_workspace`, gets a copy of the gradient. stashed: see `StashedLogits.read`.
        """
        if out is None:
            in_place = raw_logits.dtype == self.hidden.dtype or self.plan.gemms.upcast
            out = raw_logits
            if not in_place:
                out = torch.empty_like(raw_logits, dtype=self.hidden.dtype)
        self.plan.row_ops.row_grad(
            raw_logits,
            tokens.targets,
            tokens.inv_temperature,
            tokens.second_inv_temperature,
            self.logit_map,
            stats,
            coefs,
            out=out,
            bias_grad=bias_grad,
            **self.plan.row_options,
            **({} if row_major is None else {"row_major": row_major}),
            **stashed,
        )
        return out

    def _fused_stats(self, tokens: Tokens) -> RowStats:
        from aepo_kernels.gpu.fused import linear_row_stats  # the package imports without triton

        return linear_row_stats(
            take(self.hidden, tokens.positions),
            self.weight,
            tokens.targets,
            tokens.inv_temperature,
            tokens.second_inv_temperature,
            self.logit_map,
            squares=self.squares,
            logit_stats=self.logit_stats,
        )


def head_of(problem: Problem, plan: Plan) -> Head:
    """The head of a problem, cast once."""
    hidden = problem.hidden.detach()
    bias = None
    if problem.bias is not None:
        bias = problem.bias.detach().to(plan.stats_dtype).contiguous()
    softcap = None if problem.softcap is None else float(problem.softcap)
    lora = None
    if problem.lora_a is not None and problem.lora_b is not None:
        down, up = (x.detach().to(hidden.dtype) for x in (problem.lora_a, problem.lora_b))
        lora = down, up
    return Head(
        plan,
        hidden,
        problem.weight.detach().to(hidden.dtype),
        LogitMap(bias, softcap, float(problem.logit_scale)),
        lora,
        float(problem.lora_scale),
        problem.shard,
        problem.sum_squares,
        problem.mean_logits or problem.is_top1,
    )
