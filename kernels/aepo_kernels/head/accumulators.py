"""The head's gradients, added up over chunks: GEMM 2 (hidden's) and GEMM 3 (the weight's)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from aepo_kernels.cpu.huge_pages import advise
from aepo_kernels.head.plan import Plan
from aepo_kernels.problem import Problem
from aepo_kernels.ranges import part_of, slices

# Rows of hidden's gradient that are rounded at a time, on their way to their positions in the
# batch: a whole rounded copy is never made. Not measured.
_COPIED_ROWS = 512
# Rows of a gradient whose product is divided by a scale at a time. Not measured.
_SCALED_ROWS = 8192


class Gradients:
    """Gradients of a problem's inputs, summed over chunks.

    Every gradient but hidden's is a sum in float32 (float64 for float64 hidden), at any number of
    chunks. A weight's gradient that is written once is written in the weight's dtype. A gradient
    that is not needed is neither allocated nor computed. rows: number of rows that took part in
    GEMMs. variance: [], what sampling these rows added. Of float16 tensors too, sums stay float32
    to the end: the factor of the loss's backward may be what lifts them into float16's range.
    """

    def __init__(self, problem: Problem, plan: Plan, needs: tuple[bool, ...]) -> None:
        hidden, weight, bias, lora_a, lora_b = problem.inputs
        assert hidden is not None and weight is not None
        self.wide = wide = plan.stats_dtype
        self.gemms, self.scale, self.huge_pages = plan.gemms, plan.scale, plan.huge_pages
        self.dtypes = tuple(None if x is None else x.dtype for x in problem.inputs)
        self.weight_shape, self.device = weight.shape, weight.device
        self.shard, self.lora_scale, self.needs_weight = problem.shard, problem.lora_scale, needs[1]
        self.sums_hidden = problem.shard is not None and problem.shard.reduce_hidden
        self.hidden = _zeros(hidden, plan.hidden_dtype) if needs[0] else None
        self.in_place = problem.weight_grad is not None
        self.weight = problem.weight_grad  # or else made by the first chunk, which need not add
        self.weight_dtype = wide
        is_float16 = hidden.dtype == torch.float16
        once = plan.written_once and weight.dtype == hidden.dtype and not is_float16
        if once and self.weight is None:
            self.weight_dtype = hidden.dtype
        self.reuses_memory, self.rows = plan.reuses_memory, 0
        self.sampled = problem.row_sampling is not None
        self.variance = torch.zeros((), dtype=wide, device=self.device)
        self.bias, self.lora_a, self.lora_b = (
            _zeros(value, wide) if need and value is not None else None
            for value, need in zip((bias, lora_a, lora_b), needs[2:], strict=True)
        )

    def add(
        self,
        dlogits: Tensor,
        row_major: Tensor,
        weight: Tensor,
        lora: tuple[Tensor, Tensor] | None,
        inputs: Tensor,
        at: Tensor | slice,
        unscale: Tensor | None = None,
    ) -> None:
        """Add a chunk. dlogits: [C, V]. inputs: [C, H], the rows `at` of hidden. lora: (A, B).

        row_major: dlogits, or a row-major copy where dlogits are column-major. GEMM 2 reads this
        one, and GEMM 3 reads dlogits. unscale: [], what dlogits have to be multiplied by.
        """
        through = self._add_lora_a(row_major, lora, inputs, unscale)
        if self.hidden is not None:
            down = None if lora is None else lora[0]
            self._add_hidden(row_major, weight, down, through, at, unscale)
        if self.weight is not None:
            self._add_product(self.weight, dlogits.T, inputs, unscale)
        elif self.needs_weight:
            out = self.make_weight(self.weight_dtype) if self.reuses_memory else None
            self.weight = self.gemms.product(dlogits.T, inputs, self.weight_dtype, out=out)
            if unscale is not None:
                self.weight *= unscale
        if self.lora_b is not None and lora is not None:
            scaled = self.gemms.matmul(inputs, lora[0].T).mul_(self.lora_scale)  # [C, R]
            self._add_product(self.lora_b, dlogits.T, scaled, unscale)

    def make_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight's gradient, [V, H], in `dtype` or the weight's own; new memory is not set."""
        if self.weight is None:
            dtype = dtype or self.dtypes[1]
            assert dtype is not None
            self.weight = torch.empty(self.weight_shape, dtype=dtype, device=self.device)
            if self.huge_pages:
                advise(self.weight)
        return self.weight

    def hidden_sum(self, positions: Tensor | slice, dtype: torch.dtype) -> Tensor | None:
        """Hidden's gradient at some positions, or None where it cannot hold a sum in `dtype`."""
        if self.hidden is None or isinstance(positions, Tensor) or self.hidden.dtype != dtype:
            return None
        return self.hidden[positions]

    def set_hidden(self, positions: Tensor | slice, values: Tensor) -> None:
        """Write hidden's gradient at some positions. values: [A, H], rounded some rows at once."""
        assert self.hidden is not None
        for rows in slices(len(values), _COPIED_ROWS):
            self.hidden[part_of(positions, rows)] = values[rows].to(self.hidden.dtype)

    def set_weight(self, dlogits: Tensor, inputs: Tensor, rows: slice) -> None:
        """Write the weight's gradient at a slice. dlogits: [A, S]. inputs: [A, H] of all tokens."""
        if self.needs_weight:
            weight_grad = self.make_weight()[rows]
            if weight_grad.dtype in (inputs.dtype, self.wide):
                self.gemms.product(dlogits.T, inputs, weight_grad.dtype, out=weight_grad)
            else:  # no GEMM writes this dtype
                weight_grad.copy_(self.gemms.product(dlogits.T, inputs, self.wide))

    def add_slice(
        self,
        dlogits: Tensor,
        row_major: Tensor,
        weight: Tensor,
        lora: tuple[Tensor, Tensor] | None,
        inputs: Tensor,
        hidden: Tensor | None,
        rows: slice,
    ) -> None:
        """Add some tokens at a slice, to every gradient but the weight's and the bias's.

        Shapes: see `add`, with the slice's S rows in place of V. hidden: [C, H], the gradient by
        inputs is added to it.
        """
        if hidden is not None:
            self.gemms.add_product(hidden, row_major, weight)
        through = self._add_lora_a(row_major, lora, inputs)
        if lora is None or through is None:
            return
        if hidden is not None:
            self.gemms.add_product(hidden, through, lora[0])
        if self.lora_b is not None:
            scaled = self.gemms.matmul(inputs, lora[0].T).mul_(self.lora_scale)
            self.gemms.add_product(self.lora_b[rows], dlogits.T, scaled)

    def _add_product(
        self, total: Tensor, left: Tensor, right: Tensor, unscale: Tensor | None
    ) -> None:
        """total [M, N] + unscale * left [M, K] @ right [K, N], in place; None is 1."""
        if unscale is None:
            self.gemms.add_product(total, left, right)
            return
        for rows in slices(len(total), _SCALED_ROWS):
            total[rows].addcmul_(self.gemms.product(left[rows], right, total.dtype), unscale)

    def _add_lora_a(
        self,
        dlogits: Tensor,
        lora: tuple[Tensor, Tensor] | None,
        inputs: Tensor,
        unscale: Tensor | None = None,
    ) -> Tensor | None:
        """Add to lora_a's gradient; returns dlogits through lora_b, [C, R]."""
        if lora is None:
            return None
        through = self.gemms.matmul(dlogits, lora[1]).mul_(self.lora_scale)
        if self.lora_a is not None:
            self._add_product(self.lora_a, through.T, inputs, unscale)
        return through

    def _add_hidden(
        self,
        dlogits: Tensor,
        weight: Tensor,
        lora_a: Tensor | None,
        through: Tensor | None,
        at: Tensor | slice,
        unscale: Tensor | None,
    ) -> None:
        assert self.hidden is not None
        if isinstance(at, slice) and self.hidden.dtype == dlogits.dtype and lora_a is None:
            self.gemms.matmul(dlogits, weight, out=self.hidden[at])
            return
        rows = self.gemms.product(dlogits, weight, self.hidden.dtype)
        if lora_a is not None and through is not None:
            self.gemms.add_product(rows, through, lora_a)
        self.hidden[at] = rows if unscale is None else rows.mul_(unscale)

    def finish(self) -> None:
        """Add up the ranks' parts. A weight's gradient that no chunk has made becomes zeros."""
        if self.needs_weight and self.weight is None:
            dtype = self.weight_dtype
            self.weight = torch.zeros(self.weight_shape, dtype=dtype, device=self.device)
        if self.shard is not None:
            # The others belong to this rank's rows.
            for part in (self.hidden if self.sums_hidden else None, self.lora_a):
                if part is not None:
                    dist.all_reduce(part, group=self.shard.group)

    def sampling_metrics(self) -> dict[str, Tensor]:
        """The number of kept rows and the variance that sampling added; empty without sampling."""
        if not self.sampled:
            return {}
        rows = torch.full_like(self.variance, self.rows)  # new_tensor would wait for a GPU
        return {"row_sampling/rows": rows, "row_sampling/variance": self.variance}

    def results(self, factor: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Gradients times `factor`, [], in their inputs' dtypes; in place where dtypes are equal.

        A gradient is None where it is not needed, and where it went to `weight_grad`.
        """
        weight = None if self.in_place else self.weight
        values = self.hidden, weight, self.bias, self.lora_a, self.lora_b
        return tuple(
            None if value is None or dtype is None else self._result(value, factor, dtype)
            for value, dtype in zip(values, self.dtypes, strict=True)
        )

    def _result(self, value: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
        return value.to(dtype) if factor is None else self.scale(value, factor, dtype)


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    # Contiguous, however `like` lies in memory.
    return torch.zeros(like.shape, dtype=dtype, device=like.device)
