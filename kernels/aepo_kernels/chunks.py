"""Chunks of tokens and the head they go through: GEMM 1 and the row operations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aepo_kernels import cpu_rows
from aepo_kernels.backends import gemms_want_columns, row_operations
from aepo_kernels.gemm import GEMM_BYTES, add_product, in_cpp, is_widened, matmul
from aepo_kernels.options import VocabShard
from aepo_kernels.problem import Problem, slices, take
from aepo_kernels.rows import LogitMap, RowCoefs, RowStats
from aepo_kernels.sharding import combine
from aepo_kernels.sliced_logits import SlicedLogits
from aepo_kernels.tokens import Tokens

# Bytes of a chunk's logits, and its most tokens; larger chunks update the weight's fp32 gradient
# less often.
_CPU_CHUNK_BYTES, _CPU_CHUNK_TOKENS = 5 * 2**23, 1024
# Where no gradient follows: tokens, and with C++ rows columns, whose logits stay cached.
_CPU_SCORING_TOKENS, _CPU_SCORING_COLUMNS = 256, 16384
# In float32 more tokens by fewer columns: every call of its GEMMs lays the weight out anew.
_FLOAT32_SCORING = 4
_CPU_SLICE_BYTES, _ROW_BLOCK = 2**24, 2048
_CPU_SLICE_COLUMNS = 16384  # where they are rows of a GEMM's first operand
_CPU_SUM_BYTES = 28 * 2**20  # of hidden's gradient, added up beside what slices need
_CPU_WAITING_BYTES = 2**25  # of float16 logits that wait beside the weight's gradient
_GPU_CHUNK_BYTES, _GPU_CHUNK_TOKENS = 3 * 2**29, 8192
# "fused" is for small memory: its forward needs some 20 KB a token, and logits of few tokens exist
# in its backward.
_FUSED_FORWARD_TOKENS, _FUSED_CHUNK_BYTES = 4096, 2**28


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
        front = space.view(-1)[: tokens * len(self.weight)]
        if self.by_columns:
            return front.view(len(self.weight), tokens).T
        return front.view(tokens, len(self.weight))

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
            columns = min(self._scoring_columns, len(self.weight))
            size = max(tokens * columns, least)
            return self.hidden.new_empty(size, dtype=self.logits_dtype)
        return self.space(tokens)

    def score(self, tokens: Tokens, space: Tensor | None) -> RowStats:
        """Statistics without logits that last, on a CPU while they are cached."""
        if not self.by_slices:
            return self.forward(tokens, space)[1]
        assert space is not None
        return self._stats_by_slices(tokens, self._scoring_columns, space)

    @property
    def _scoring_columns(self) -> int:
        is_float32 = self.logits_dtype == torch.float32
        return _CPU_SCORING_COLUMNS // (_FLOAT32_SCORING if is_float32 else 1)

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
            out, base = (None, None) if room is None else room.at(head, rows)
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
        return row_operations(products).row_stats(
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
        row_operations(products).row_grad(
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
        from aepo_kernels.triton_fused import linear_row_stats  # the package imports without triton

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
    bias = None if problem.bias is None else problem.bias.detach().to(dtype)
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
        problem.backend == "chunked" and row_operations(hidden) is cpu_rows,
        problem.backend == "chunked" and gemms_want_columns(hidden),
        lora,
        float(problem.lora_scale),
        problem.shard,
        problem.sum_squares,
    )


def logits_dtype(problem: Problem) -> torch.dtype:
    """The dtype of the first GEMM's output: hidden's, or that of widened GEMMs."""
    if is_widened(problem.hidden):
        return torch.float32
    return problem.logits_dtype or problem.hidden.dtype


def logits_bytes(problem: Problem) -> int:
    """Bytes of a logit in a chunk, with its gradient where that is beside it."""
    width, hidden = logits_dtype(problem).itemsize, problem.hidden
    beside = hidden.device.type != "cpu" and width != hidden.element_size()
    return width + hidden.element_size() if beside else width


def chunk_size(problem: Problem) -> int:
    """Tokens whose logits exist at once: the caller's number, or what the memory budget holds."""
    if problem.chunk_tokens is not None:
        return problem.chunk_tokens
    hidden, width = problem.hidden, logits_bytes(problem)
    budget, most = _CPU_CHUNK_BYTES, _CPU_CHUNK_TOKENS
    if problem.backend == "chunked" and gemms_want_columns(hidden):
        budget //= 2  # their gradient is written twice
    elif is_widened(hidden) or in_cpp(hidden):
        budget -= GEMM_BYTES
    if hidden.device.type != "cpu":
        budget, most = _GPU_CHUNK_BYTES, _GPU_CHUNK_TOKENS
    if problem.backend == "fused":
        budget = _FUSED_CHUNK_BYTES
    size = budget // (problem.chunk_vocab * width)
    step = 16 if hidden.device.type == "cpu" else 64
    return min(max(size // step * step, step), most)


def gradient_chunk_size(problem: Problem, needs_weight: bool, rows: int) -> int:
    """Tokens whose gradients are made at once, of so many.

    On a GPU chunks are equal, and one where its logits need no more memory than those of a chunk
    and the float32 sum of the weight's gradients, which it does without.
    """
    size = chunk_size(problem)
    if problem.hidden.device.type == "cpu" or problem.chunk_tokens is not None or rows <= size:
        return size
    weight = problem.weight
    plain = (problem.weight_grad, problem.row_sampling) == (None, None)
    at_once = problem.backend != "fused" or rows <= _FUSED_FORWARD_TOKENS
    if needs_weight and plain and at_once and weight.dtype == problem.hidden.dtype:
        spared = problem.stats_dtype.itemsize * weight.shape[1]  # bytes per row of weight
        if rows <= size + spared // logits_bytes(problem):
            return rows
    count = -(-rows // size)
    return -(-rows // (64 * count)) * 64


def slice_size(problem: Problem, needs_weight: bool, rows: int) -> int | None:
    """Rows of weight whose gradient is made at once, or None where chunks of tokens add it up.

    Slices are the caller's choice, or on a CPU that of GEMMs which take more than one chunk: to add
    up the weight's gradient would take more time, in half precision memory too. In float32 they pay
    where rows come by slices as well, so that few logits are made twice.
    """
    if problem.weight_slice is not None:
        return problem.weight_slice
    weight, hidden = problem.weight, problem.hidden
    plain = (problem.weight_grad, problem.row_sampling, problem.chunk_tokens) == (None, None, None)
    pays = hidden.dtype != problem.stats_dtype or row_operations(hidden) is cpu_rows
    pays = pays and weight.dtype in (hidden.dtype, torch.float32)
    if not (needs_weight and plain and pays and hidden.device.type == "cpu"):
        return None
    if problem.backend != "chunked" or rows <= chunk_size(problem):
        return None
    most = _CPU_SLICE_COLUMNS if gemms_want_columns(hidden) else len(weight)
    size = max(_CPU_SLICE_BYTES // (logits_dtype(problem).itemsize * rows) // 64 * 64, 64)
    size = min(size, most)
    # Multiples of the blocks in which rows are added up give the same bits as whole rows.
    return size if size < _ROW_BLOCK else size // _ROW_BLOCK * _ROW_BLOCK


def waiting_as_float16(problem: Problem, rows: int) -> tuple[int, int]:
    """Of so many rows, how many wait for slices as float16: in the weight's gradient, and beside.

    Those are widened ones of which too few would fit as they are.
    """
    hidden, weight = problem.hidden, problem.weight
    if problem.backend != "chunked" or not is_widened(hidden):
        return 0, 0
    if row_operations(hidden) is not cpu_rows:
        return 0, 0
    lent, keeps = weight.shape[1] * weight.element_size(), keeps_logits(problem, rows)
    if rows <= lent // torch.float32.itemsize + (chunk_size(problem) if keeps else 0):
        return 0, 0
    inside = min(rows, lent // torch.float16.itemsize)
    held = _CPU_WAITING_BYTES // (torch.float16.itemsize * len(weight)) if keeps else 0
    return inside, min(rows - inside, held)


def keeps_logits(problem: Problem, rows: int) -> bool:
    """Whether slices of so many rows take the last chunk's logits instead of making them again."""
    return (
        problem.hidden.device.type == "cpu" and _sum_bytes(problem, rows) <= _CPU_SLICE_BYTES // 4
    )


def goes_by_blocks(problem: Problem, rows: int) -> bool:
    """Whether slices take some of so many rows at a time, to keep memory within its bound."""
    on_cpu = problem.hidden.device.type == "cpu" and problem.backend == "chunked"
    return on_cpu and _sum_bytes(problem, rows) > _CPU_SUM_BYTES


def _sum_bytes(problem: Problem, rows: int) -> int:
    """Bytes of the sum of hidden's gradient."""
    return problem.stats_dtype.itemsize * rows * problem.hidden.shape[1]


def forward_chunk_size(problem: Problem) -> int:
    """Tokens that go through the forward pass at once."""
    return _FUSED_FORWARD_TOKENS if problem.backend == "fused" else chunk_size(problem)


def scoring_chunk_size(problem: Problem) -> int:
    """The same where no gradient follows: on a CPU few enough for their logits to stay cached."""
    size = forward_chunk_size(problem)
    if problem.hidden.device.type != "cpu" or problem.chunk_tokens is not None:
        return size
    if row_operations(problem.hidden) is not cpu_rows:
        return min(size, _CPU_SCORING_TOKENS)
    # By slices, whose size is no matter of V.
    is_float32 = logits_dtype(problem) == torch.float32
    return _CPU_SCORING_TOKENS * (_FLOAT32_SCORING if is_float32 else 1)
