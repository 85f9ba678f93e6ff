"""The head that tokens go through: GEMM 1 and the row operations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aepo_kernels import backends
from aepo_kernels.cpu import rows as cpu_rows
from aepo_kernels.gemm import add_product, is_widened, matmul
from aepo_kernels.head.plan import logits_dtype, scoring_columns
from aepo_kernels.head.sharding import combine
from aepo_kernels.head.stashed_logits import SlicedLogits, logits_in
from aepo_kernels.head.tokens import Tokens
from aepo_kernels.problem import Problem, VocabShard
from aepo_kernels.ranges import slices, take
from aepo_kernels.rows.interface import LogitMap, RowCoefs, RowStats


@dataclass(frozen=True)
class Head:
    """The head as GEMMs and rows read it: weight, lora (A, B) in hidden's dtype, bias in `dtype`.

    logits_dtype: of the first GEMM's output. fused: the forward pass does not write logits.
    by_slices: rows can come a slice of their columns after the other. by_columns: logits lie by
    columns, as the transpose of a contiguous matrix.
    """

    hidden: Tensor
    weight: Tensor
    logit_map: LogitMap
    dtype: torch.dtype
    logits_dtype: torch.dtype
    fused: bool
    by_slices: bool
    by_columns: bool
    lora: tuple[Tensor, Tensor] | None
    lora_scale: float
    shard: VocabShard | None
    squares: bool

    def space(self, tokens: int) -> Tensor | None:
        """Room for the logits of so many tokens, for chunk after chunk.

        None on a GPU, whose allocator keeps memory; on a CPU fresh memory costs more than the rows.
        """
        if self.hidden.is_cuda or self.fused:
            return None
        return self.hidden.new_empty(tokens * len(self.weight), dtype=self.logits_dtype)

    def by_rows_space(self, tokens: int) -> Tensor | None:
        """Room for the logits' gradient once more, by rows, where logits lie by columns; [C, V]."""
        if not self.by_columns:
            return None
        width = len(self.weight)
        # Rows a power of two apart would fall into the same few lines of the cache, and oneDNN
        # multiplies up to 31 numbers beyond each row by zero.
        space = self.hidden.new_empty(tokens, width + 32)
        space[:, width:] = 0
        return space[:, :width]

    def logits_in(self, space: Tensor, tokens: int) -> Tensor:
        """[C, V] at the front of contiguous memory, as logits lie."""
        return logits_in(space, tokens, len(self.weight), by_columns=self.by_columns)

    def forward(
        self, tokens: Tokens, space: Tensor | None = None
    ) -> tuple[Tensor | None, RowStats]:
        """Raw logits of some tokens, [C, V], unless the forward is fused; and their statistics.

        The logits may lie in `space` and last until it is used again.
        """
        if self.fused:
            return None, self._fused_stats(tokens)
        out = None if space is None else self.logits_in(space, len(tokens.targets))
        products = self.products(tokens, out)
        return products, self.stats(tokens, products)

    def scoring_space(self, tokens: int, least: int = 0) -> Tensor | None:
        """Room for `score`, of so many numbers at least."""
        if self.by_slices:
            columns = min(scoring_columns(self.logits_dtype), len(self.weight))
            size = max(tokens * columns, least)
            return self.hidden.new_empty(size, dtype=self.logits_dtype)
        return self.space(tokens)

    def score(self, tokens: Tokens, space: Tensor | None) -> RowStats:
        """Statistics without logits that last, on a CPU while they are cached."""
        if not self.by_slices:
            return self.forward(tokens, space)[1]
        assert space is not None
        return self._stats_by_slices(tokens, scoring_columns(self.logits_dtype), space)

    def forward_into(self, room: SlicedLogits, tokens: Tokens, space: Tensor | None) -> RowStats:
        """Statistics, with logits in memory that keeps them; float16 ones are made in `space`."""
        return self._stats_by_slices(tokens, room.size, space, room)

    def _stats_by_slices(
        self, tokens: Tokens, size: int, space: Tensor | None, room: SlicedLogits | None = None
    ) -> RowStats:
        count = len(self.weight)
        state, stats = cpu_rows.new_state(len(tokens.targets)), None
        for rows in slices(count, size):
            head, local = self.at(rows), tokens.within(rows)
            part: dict[str, Any] = {"is_first": rows.start == 0, "is_last": rows.stop == count}
            out, base = (None, None) if room is None else room.at(rows)
            if base is not None:
                part |= {"kept": out, "base": base}
            if out is None or base is not None:
                assert space is not None
                out = head.logits_in(space, len(local.targets))
            stats = head.row_stats(local, head.products(local, out), state=state, **part)
        assert stats is not None
        return self._whole(stats, tokens)

    def stats(self, tokens: Tokens, products: Tensor) -> RowStats:
        """Statistics of the rows of raw logits; of whole rows where the vocabulary is sharded."""
        return self._whole(self.row_stats(tokens, products), tokens)

    def row_stats(self, tokens: Tokens, products: Tensor, **part: Any) -> Any:
        """The row operation of that name; `part` is for slices of the columns."""
        return backends.row_operations(products).row_stats(
            products,
            tokens.targets,
            tokens.inv_temperature,
            tokens.second_inv_temperature,
            self.logit_map,
            self.dtype,
            squares=self.squares,
            **part,
        )

    def _whole(self, stats: RowStats, tokens: Tokens) -> RowStats:
        if self.shard is None:
            return stats
        temperatures = tokens.inv_temperature, tokens.second_inv_temperature
        return combine(stats, tokens.targets, *temperatures, self.shard)

    def at(self, rows: slice) -> Head:
        """The head of some rows of the vocabulary."""
        bias, lora = self.logit_map.bias, self.lora
        return replace(
            self,
            weight=self.weight[rows],
            logit_map=replace(self.logit_map, bias=None if bias is None else bias[rows]),
            lora=None if lora is None else (lora[0], lora[1][rows]),
        )

    def products(self, tokens: Tokens, out: Tensor | None = None) -> Tensor:
        """GEMM 1: the raw logits of some tokens, [C, V], in `out` where there is one."""
        inputs = take(self.hidden, tokens.positions)
        if self.by_columns:
            transposed = None if out is None else out.T
            products = matmul(self.weight, inputs.T, self.logits_dtype, out=transposed).T
        else:
            products = matmul(inputs, self.weight.T, self.logits_dtype, out=out)
        if self.lora is not None:
            down, up = self.lora
            add_product(products, matmul(inputs, down.T).mul_(self.lora_scale), up.T)
        return products

    def dlogits(
        self,
        tokens: Tokens,
        products: Tensor,
        stats: RowStats,
        coefs: RowCoefs,
        bias_grad: Tensor | None,
        out: Tensor | None = None,
        by_rows: Tensor | None = None,
        **waited: Tensor,
    ) -> Tensor:
        """The loss's gradient by the raw logits, in hidden's dtype or, widened, in place in theirs.

        by_rows: see `by_rows_space`; gets the gradient as well. waited: see `SlicedLogits.read`.
        """
        if out is None:
            in_place = products.dtype == self.hidden.dtype or is_widened(self.hidden)
            out = products if in_place else torch.empty_like(products, dtype=self.hidden.dtype)
        backends.row_operations(products).row_grad(
            products,
            tokens.targets,
            tokens.inv_temperature,
            tokens.second_inv_temperature,
            self.logit_map,
            stats,
            coefs,
            out=out,
            bias_grad=bias_grad,
            **({} if by_rows is None else {"by_rows": by_rows}),
            **waited,
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
        )


def head_of(problem: Problem) -> Head:
    """The head of a problem, cast once."""
    hidden, dtype = problem.hidden.detach(), problem.stats_dtype
    bias = None if problem.bias is None else problem.bias.detach().to(dtype).contiguous()
    softcap = None if problem.softcap is None else float(problem.softcap)
    lora = None
    if problem.lora_a is not None and problem.lora_b is not None:
        down, up = (x.detach().to(hidden.dtype) for x in (problem.lora_a, problem.lora_b))
        lora = down, up
    return Head(
        hidden,
        problem.weight.detach().to(hidden.dtype),
        LogitMap(bias, softcap, float(problem.logit_scale)),
        dtype,
        logits_dtype(problem),
        problem.backend == "fused",
        problem.backend == "chunked" and backends.row_operations(hidden) is cpu_rows,
        problem.backend == "chunked" and backends.gemms_want_columns(hidden),
        lora,
        float(problem.lora_scale),
        problem.shard,
        problem.sum_squares,
    )
