"""The decisions of one call: what is in memory at once, and which pass adds up gradients.

`make_plan` reads the problem's device, dtypes and backend once. It hands over a `Plan` of
decisions, so that no later code asks for those again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import ModuleType

import torch
from torch import Tensor

from aepo_kernels import backends
from aepo_kernels.cpu import rows as cpu_rows
from aepo_kernels.gemm import Gemms
from aepo_kernels.head import scaling
from aepo_kernels.head.budget import DEFAULT_BUDGET, Budget
from aepo_kernels.problem import Problem
from aepo_kernels.rows import torch_rows

# The C++ rows are added up in blocks of so many columns: kBlock of csrc/cpu/row_math.h. Slices that
# are multiples of a block give the same bits as whole rows.
_ROW_BLOCK = 2048


class Strategy(Enum):
    """Which pass adds up gradients: over chunks of tokens, slices of the vocabulary, or both."""

    CHUNKS = "chunks"
    SLICES = "slices"
    BLOCKS = "blocks"


@dataclass(frozen=True)
class Stash:
    """Where raw logits wait for slices: in the weight's gradient, [V, H], and in memory beside it.

    dtype: the raw logits' own; or float16, less a base per row. beside: tokens in [V, beside].
    """

    dtype: torch.dtype
    beside: int = 0


@dataclass(frozen=True)
class Plan:
    """The decisions of one call.

    How to compute:
    row_ops: module with `row_stats` and `row_grad`; row_options: further arguments of both. gemms:
    how GEMMs multiply. scale: multiplies a finished gradient by one number. stats_dtype: of row
    statistics and sums. logits_dtype: of raw logits, [C, V]. fused: the forward pass writes no
    logits. column_major: logits are the transpose of a contiguous matrix [V, C]. sliced_stats:
    statistics can come from one slice of the columns after the other.

    How to use memory:
    reuses_memory: one workspace serves chunk after chunk. A GPU's allocator keeps memory; on a CPU
    fresh memory costs more than the row operations. huge_pages: large gradients lie in huge pages.
    drops_inactive: rows without a coefficient are left out of the gradient GEMMs. On a GPU, finding
    those rows waits for the device.

    How much at once:
    forward_tokens: most tokens of a chunk that a gradient follows. gradient_tokens: most tokens
    whose gradients are made at once. stats_tokens, stats_columns: most tokens and columns where no
    gradient follows.

    Who adds up gradients:
    scales_gradient: float16 holds the logits' gradient, see `head.gradient_scale`. strategy: the
    pass. slice_rows: rows of the weight in a slice; most_slice_rows is the caller's
    limit. most_picked: most rows of hidden that slices may copy, or None for any. stash: where raw
    logits wait for slices. keeps_last: slices take the last chunk's logits instead of making them
    again. written_once: the weight's gradient is written by a single GEMM. direction: see
    `direction_of`. hidden_dtype: of hidden's gradient until it is finished.
    """

    budget: Budget
    row_ops: ModuleType
    row_options: dict[str, int]
    gemms: Gemms
    scale: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    stats_dtype: torch.dtype
    logits_dtype: torch.dtype
    fused: bool
    column_major: bool
    sliced_stats: bool
    reuses_memory: bool
    huge_pages: bool
    drops_inactive: bool
    scales_gradient: bool
    forward_tokens: int
    gradient_tokens: int
    stats_tokens: int
    stats_columns: int
    strategy: Strategy
    slice_rows: int
    most_slice_rows: int | None
    most_picked: int | None
    stash: Stash | None
    keeps_last: bool
    written_once: bool
    direction: str | None
    hidden_dtype: torch.dtype


def make_plan(
    problem: Problem,
    *,
    needs_weight: bool = False,
    rows: int = 0,
    direction: str | None = None,
    budget: Budget = DEFAULT_BUDGET,
) -> Plan:
    """Decide how a call goes.

    needs_weight: the weight needs a gradient. rows: at most so many tokens have a gradient.
    direction: see `direction_of`.
    """
    facts = _Facts(problem, budget)
    size = facts.gradient_tokens(needs_weight, rows)
    slice_rows, stash, keeps_last = facts.slice_rows(needs_weight, rows), None, False
    strategy = Strategy.CHUNKS
    if slice_rows is not None:
        blocks = needs_weight and facts.sum_bytes(rows) > budget.sum_bytes
        strategy = Strategy.BLOCKS if blocks and facts.on_cpu_in_chunks else Strategy.SLICES
    if strategy is Strategy.SLICES:
        stash = facts.stash(rows) if needs_weight and facts.cpp_rows else None
        # Stashed float16 logits need the workspace that the last chunk's logits would lie in.
        is_float16 = stash is not None and stash.dtype == torch.float16
        keeps_last = facts.keeps_last(rows) and not is_float16
    forward = budget.fused_forward_tokens if facts.fused else size
    return Plan(
        budget=budget,
        row_ops=facts.row_ops,
        row_options=facts.row_options(),
        gemms=facts.gemms,
        scale=facts.scale(),
        stats_dtype=problem.stats_dtype,
        logits_dtype=facts.logits_dtype,
        fused=facts.fused,
        column_major=facts.column_major,
        sliced_stats=facts.cpp_rows,
        reuses_memory=facts.on_cpu,
        huge_pages=facts.on_cpu,
        drops_inactive=facts.on_cpu or problem.row_sampling is not None,
        scales_gradient=facts.is_float16 and not facts.gemms.upcast,
        forward_tokens=forward,
        gradient_tokens=size,
        stats_tokens=facts.stats_tokens(),
        stats_columns=facts.stats_columns(),
        strategy=strategy,
        slice_rows=slice_rows or 0,
        most_slice_rows=problem.weight_slice,
        most_picked=facts.most_picked() if needs_weight else None,
        stash=stash,
        keeps_last=keeps_last,
        written_once=slice_rows is not None or rows <= min(size, forward),
        direction=direction,
        hidden_dtype=facts.hidden_dtype(direction),
    )


def direction_of(problem: Problem) -> str | None:
    """The output of `linear_logprob` whose derivative by hidden its forward pass writes, or None.

    With a frozen head, an output's gradient by a row of hidden is a fixed direction, [H], times a
    number that backward brings. Written while the logits are there, it spares backward a GEMM: 2 in
    all and not 3. A second direction would cost the GEMM that the first one spares. So there is one
    at most: of the only output in `grad_of`, or where nothing is named of `logprob`. A call with a
    second temperature must name it: its loss may well take the gradients of two outputs. None, so
    that backward makes the logits again: where another input than hidden needs a gradient; with
    "fused", whose forward pass has no logits; with `weight_slice`, whose gradients go by slices;
    and with `kept_ids`, where no GEMM is to be spared.
    """
    if problem.needs != (True, False, False, False, False) or problem.features.fused:
        return None
    if problem.weight_slice is not None or problem.kept_ids is not None:
        return None
    if problem.grad_of is not None:
        return problem.grad_of[0] if len(problem.grad_of) == 1 else None
    return "logprob" if problem.second_temperature is None else None


def direction_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of a direction by hidden, [N, H]: float32, or float64 of float64 hidden.

    Backward multiplies it by a factor, and one rounding after that is enough. Where the GEMM that
    writes it rounds to bfloat16 in any case, float32 would hold no more.
    """
    gemms = gemms_for(hidden, DEFAULT_BUDGET)
    rounds = not (gemms.in_cpp or gemms.upcast or gemms.writes_float32)
    return hidden.dtype if rounds else torch.promote_types(hidden.dtype, torch.float32)


def gemms_for(hidden: Tensor, budget: Budget) -> Gemms:
    """How GEMMs of these hidden states, [N, H], multiply."""
    return Gemms(
        in_cpp=backends.gemms_in_cpp(hidden),
        upcast=backends.upcasts_gemms(hidden),
        writes_float32=backends.writes_float32(hidden),
        block_bytes=budget.gemm_block_bytes,
    )


class _Facts:
    """What a plan depends on, read from the problem once."""

    def __init__(self, problem: Problem, budget: Budget) -> None:
        hidden, self.fused = problem.hidden, problem.features.fused
        self.problem, self.budget = problem, budget
        self.on_cpu = hidden.device.type == "cpu"
        self.is_float16 = hidden.dtype == torch.float16
        self.on_cpu_in_chunks = self.on_cpu and not self.fused
        self.row_ops = backends.row_operations(hidden)
        # C++ rows need no whole rows: a slice of the columns after the other will do.
        self.cpp_rows = not self.fused and self.row_ops is cpu_rows
        self.column_major = not self.fused and backends.gemms_want_column_major(hidden)
        self.gemms = gemms_for(hidden, budget)
        self.logits_dtype = problem.logits_dtype or hidden.dtype
        if self.gemms.upcast:
            self.logits_dtype = torch.float32
        self.chunk_tokens = self._chunk_tokens()

    def row_options(self) -> dict[str, int]:
        """What torch's row operations take beside the arguments that all of them have."""
        if self.row_ops is not torch_rows:
            return {}
        budget = self.budget
        size = budget.torch_rows_elements if self.on_cpu else budget.gpu_torch_rows_elements
        return {"block_elements": size}

    def scale(self) -> Callable[[Tensor, Tensor, torch.dtype], Tensor]:
        """How a finished gradient is multiplied by one number: see `head.scaling`."""
        if self.on_cpu:
            return scaling.scale_unless_one
        if not self.problem.hidden.is_cuda or self.problem.stats_dtype == torch.float64:
            return scaling.scale
        from aepo_kernels.gpu.scale import scale  # the package imports without triton

        return scale

    def hidden_dtype(self, direction: str | None) -> torch.dtype:
        """Dtype of hidden's gradient until it is finished.

        A sum over ranks is float32. So is the gradient of float16 tensors: the factor of the loss's
        backward may be what lifts it into float16's range.
        """
        problem = self.problem
        if problem.shard is not None and problem.shard.reduce_hidden or self.is_float16:
            return problem.stats_dtype
        return problem.hidden.dtype if direction is None else direction_dtype(problem.hidden)

    def logits_bytes(self) -> int:
        """Bytes of a logit in a chunk, with its gradient where that is beside it."""
        width, own = self.logits_dtype.itemsize, self.problem.hidden.element_size()
        return width + own if not self.on_cpu and width != own else width

    def _chunk_tokens(self) -> int:
        """Tokens whose logits exist at once: the caller's number, or what the budget holds."""
        if self.problem.chunk_tokens is not None:
            return self.problem.chunk_tokens
        budget, most = self.budget.chunk_bytes, self.budget.chunk_tokens
        if self.column_major:
            budget //= 2  # their gradient is written twice
        elif self.gemms.upcast or self.gemms.in_cpp:
            budget -= self.budget.gemm_bytes
        if not self.on_cpu:
            budget, most = self.budget.gpu_chunk_bytes, self.budget.gpu_chunk_tokens
        if self.fused:
            budget = self.budget.fused_chunk_bytes
        size = budget // (self.problem.chunk_vocab * self.logits_bytes())
        step = 16 if self.on_cpu else 64
        return min(max(size // step * step, step), most)

    def gradient_tokens(self, needs_weight: bool, rows: int) -> int:
        """Tokens whose gradients are made at once, of so many.

        On a GPU chunks are equal. There is one chunk where its logits need no more memory than
        those of a budgeted chunk and the float32 sum of the weight's gradients, which one chunk
        does without.
        """
        problem, size = self.problem, self.chunk_tokens
        if self.on_cpu or problem.chunk_tokens is not None or rows <= size:
            return size
        weight = problem.weight
        plain = (problem.weight_grad, problem.row_sampling) == (None, None)
        at_once = not self.fused or rows <= self.budget.fused_forward_tokens
        same = weight.dtype == problem.hidden.dtype and not self.is_float16
        if needs_weight and plain and at_once and same:
            spared = problem.stats_dtype.itemsize * weight.shape[1]  # bytes per row of weight
            if rows <= size + spared // self.logits_bytes():
                return rows
        count = -(-rows // size)
        return -(-rows // (64 * count)) * 64

    def slice_rows(self, needs_weight: bool, rows: int) -> int | None:
        """Rows of weight whose gradient is made at once, or None for chunks of tokens.

        Slices are the caller's choice, or on a CPU that of GEMMs which take more than one chunk: to
        add up the weight's gradient would take more time, in half precision memory too. In float32
        they pay with C++ rows alone, of which few logits are made twice.
        """
        problem, hidden, weight = self.problem, self.problem.hidden, self.problem.weight
        if problem.weight_slice is not None:
            return problem.weight_slice
        asked = problem.weight_grad, problem.row_sampling, problem.chunk_tokens
        # Gradients of float16 tensors are sums in float32 to the end: see `Gradients`.
        pays = hidden.dtype != problem.stats_dtype or self.cpp_rows
        pays = pays and not self.is_float16
        pays = pays and weight.dtype in (hidden.dtype, torch.float32)
        if not (needs_weight and asked == (None, None, None) and pays and self.on_cpu_in_chunks):
            return None
        if rows <= self.chunk_tokens:
            return None
        most = self.budget.slice_columns if self.column_major else len(weight)
        size = self.budget.slice_bytes // (self.logits_dtype.itemsize * rows) // 64 * 64
        size = min(max(size, 64), most)
        return size if size < _ROW_BLOCK else size // _ROW_BLOCK * _ROW_BLOCK

    def stash(self, rows: int) -> Stash | None:
        """Where raw logits of so many tokens wait; too many upcast ones wait as float16."""
        weight, budget = self.problem.weight, self.budget
        lent = weight.shape[1] * weight.element_size()  # bytes of a row of the weight's gradient
        chunk = self.chunk_tokens if self.keeps_last(rows) else 0
        if self.gemms.upcast and rows > lent // torch.float32.itemsize + chunk:
            inside = min(rows, lent // torch.float16.itemsize)
            held = budget.stash_bytes // (torch.float16.itemsize * self.problem.chunk_vocab)
            return Stash(torch.float16, min(rows - inside, held if chunk else 0))
        return None if lent % self.logits_dtype.itemsize else Stash(self.logits_dtype)

    def keeps_last(self, rows: int) -> bool:
        """Whether slices of so many rows take the last chunk's logits instead of new ones."""
        return self.on_cpu and self.sum_bytes(rows) <= self.budget.slice_bytes // 4

    def sum_bytes(self, rows: int) -> int:
        """Bytes of the sum of hidden's gradient."""
        return self.problem.stats_dtype.itemsize * rows * self.problem.hidden.shape[1]

    def most_picked(self) -> int | None:
        """Rows of hidden that slices may copy, beside a sum of their gradient; None is any."""
        if not self.on_cpu_in_chunks:
            return None
        hidden, most = self.problem.hidden, self.budget.sum_bytes
        most += 0 if self.column_major else self.budget.slice_bytes // 2
        return most // max(1, self.sum_bytes(1) + hidden.shape[1] * hidden.element_size())

    def stats_tokens(self) -> int:
        """Tokens at once where no gradient follows: on a CPU, few enough to stay cached."""
        size = self.budget.fused_forward_tokens if self.fused else self.chunk_tokens
        if not self.on_cpu or self.problem.chunk_tokens is not None:
            return size
        if self.row_ops is not cpu_rows:
            return min(size, self.budget.stats_tokens)
        # By slices of the columns, whose size does not depend on V.
        return self.budget.stats_tokens * self._float32_factor()

    def stats_columns(self) -> int:
        """Columns at once where no gradient follows, in slices that stay cached."""
        return self.budget.stats_columns // self._float32_factor()

    def _float32_factor(self) -> int:
        return self.budget.float32_stats_factor if self.logits_dtype == torch.float32 else 1
