"""Matrix products: operands in the model's dtype, sums in float32.

Some CPUs have no bfloat16 instructions. torch multiplies bfloat16 numbers one by one there, at a
tenth to a hundredth of its float32 speed. On such a CPU, GEMMs are upcast; float16 GEMMs are upcast
on every CPU. The GEMMs in C++ (`cpu.gemm`) convert operands to float32 while they pack them.
Without C++, some rows of an operand at a time become float32, while those rows are cached. The
product is rounded once in both cases.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from aepo_kernels.cpu import gemm as cpu_gemm
from aepo_kernels.ranges import slices

# torch's switches that let cuBLAS add the parts of a split reduction in half precision.
_REDUCED_SUMS = "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"


@dataclass(frozen=True)
class Gemms:
    """How the GEMMs of one call multiply: a plan decides it, `head.plan.gemms_for`.

    in_cpp: `cpu.gemm` multiplies. upcast: half-precision operands are converted to float32; without
    in_cpp, block by block. writes_float32: torch's GEMM of bfloat16 operands can write float32. A
    CPU's cannot: its bfloat16 products are added to a float32 sum block by block. block_bytes: size
    of such a block.
    """

    in_cpp: bool
    upcast: bool
    writes_float32: bool
    block_bytes: int

    def matmul(
        self,
        left: Tensor,
        right: Tensor,
        dtype: torch.dtype | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """left [M, K] @ right [K, N], summed in float32 and rounded once.

        dtype: of the result; None is the operands'. float32 from half precision needs
        `writes_float32` or `upcast`. out: [M, N] in the result's dtype, gets the result.
        """
        if self.in_cpp or self.upcast:
            if out is None:
                shape = len(left), right.shape[1]
                out = torch.empty(shape, dtype=dtype or left.dtype, device=left.device)
            return self._in_float32(out, left, right)
        if dtype is None or dtype == left.dtype:
            return torch.mm(left, right, out=out)
        return torch.mm(left, right, out_dtype=dtype)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """total [M, N] + left [M, K] @ right [K, N], in place and summed in total's dtype."""
        if self.in_cpp or self.upcast:
            return self._in_float32(total, left, right, add=True)
        if total.dtype == left.dtype:
            return total.addmm_(left, right)
        if self.writes_float32:
            return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        wide = None
        for rows, block in self._blocks(left, right):
            wide = torch.empty_like(block, dtype=total.dtype) if wide is None else wide
            total[rows].add_(wide[: len(block)].copy_(block))  # add_ itself would make a new copy
        return total

    def product(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Tensor:
        """left [M, K] @ right [K, N] in any `dtype`.

        Where GEMMs of bfloat16 operands write bfloat16 alone, the product is rounded to it first.
        """
        if dtype == left.dtype or self.upcast:
            return self.matmul(left, right, dtype, out=out)
        if self.writes_float32:
            wide = self.matmul(left, right, dtype)
            return wide if out is None else out.copy_(wide)
        total = out
        if total is None:
            total = torch.empty(len(left), right.shape[1], dtype=dtype, device=left.device)
        for rows, block in self._blocks(left, right):
            total[rows] = block
        return total

    def _blocks(self, left: Tensor, right: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of left @ right at a time, [rows, N]; each block lasts until the next one."""
        count, width = len(left), right.shape[1]
        size = max(64, self.block_bytes // max(1, width * left.element_size()) // 64 * 64)
        workspace = left.new_empty(min(size, count), width)
        for rows in slices(count, size):
            yield rows, torch.mm(left[rows], right, out=workspace[: rows.stop - rows.start])

    def _in_float32(self, out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> Tensor:
        """left @ right into `out` or added to it: in C++, or by float32 blocks of the longest side.

        One of the operands may be float32 already.
        """
        if self.in_cpp:
            return cpu_gemm.multiply(out, left, right, add=add)
        (rows, inner), columns = left.shape, right.shape[1]
        if inner > max(rows, columns):
            self._upcast_inner(out, left, right, add)
        elif columns > rows:
            self._upcast_rows(out.T, right.T, left.T, add)
        else:
            self._upcast_rows(out, left, right, add)
        return out

    def _upcast_rows(self, out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
        (rows, inner), columns = left.shape, right.shape[1]
        size = self._block_size(rows, max(inner, columns))
        workspace, product = _workspace_like(left, size), _workspace_like(out, size)
        right = right.float()  # [K, N]
        for block in slices(rows, size):
            wide = _upcast(left[block], workspace)  # [rows, K]
            if out.dtype == torch.float32:
                torch.addmm(out[block], wide, right, beta=float(add), out=out[block])
            elif add:
                out[block] += torch.mm(wide, right, out=product[: len(wide)])
            else:
                out[block] = torch.mm(wide, right, out=product[: len(wide)])

    def _upcast_inner(self, out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
        (rows, inner), columns = left.shape, right.shape[1]
        total = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        size = self._block_size(inner, max(rows, columns))
        lefts, rights = _workspace_like(left.T, size), _workspace_like(right, size)
        for block in slices(inner, size):
            # [inner block, M] and [inner block, N]
            some, others = _upcast(left.T[block], lefts), _upcast(right[block], rights)
            begun = block.start > 0 or (add and total is out)
            torch.addmm(total, some.T, others, beta=float(begun), out=total)
        if total is not out:
            out.add_(total) if add else out.copy_(total)

    def _block_size(self, count: int, width: int) -> int:
        return min(max(1, count), max(64, self.block_bytes // (4 * max(1, width)) // 64 * 64))


def _workspace_like(matrix: Tensor, rows: int) -> Tensor:
    """Float32 memory for some rows of a matrix, in the matrix's own layout."""
    columns = matrix.shape[1]
    if matrix.stride(0) == 1 and matrix.stride(1) > 1:
        return matrix.new_empty(columns, rows, dtype=torch.float32).T
    return matrix.new_empty(rows, columns, dtype=torch.float32)


def _upcast(rows: Tensor, workspace: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float32 else workspace[: len(rows)].copy_(rows)


class _WholeSums:
    """A context in which cuBLAS adds the parts of a split reduction in float32, for all threads.

    The switches belong to the process. So the first thread to enter remembers their settings, and
    the last thread to leave restores them, in whatever order threads come and go.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before = [False] * len(_REDUCED_SUMS)

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():  # dynamo lets no traced code turn the switch
            from aepo_kernels import torch_op

            torch_op.uncompiled(self.__enter__)
            return
        with self._lock:
            if not self._inside:
                self._before = [getattr(torch.backends.cuda.matmul, x) for x in _REDUCED_SUMS]
                self._allow([False] * len(_REDUCED_SUMS))
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        if torch.compiler.is_compiling():
            from aepo_kernels import torch_op

            torch_op.uncompiled(self.__exit__, *error)
            return
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._allow(self._before)

    @staticmethod
    def _allow(reduced: list[bool]) -> None:
        settings = torch.backends.cuda.matmul
        for name, value in zip(_REDUCED_SUMS, reduced, strict=True):
            # Set alone, it would also allow the splits that someone else has forbidden.
            split = getattr(settings, f"{name}_split_k", None)
            setattr(settings, name, value if split is None else (value, split))


# Public: a thread may need it for GEMMs of its own while another thread is in the kernels.
whole_sums = _WholeSums()


@contextmanager
def computing_on(hidden: Tensor) -> Iterator[None]:
    """The context that GEMMs and kernels on the device of `hidden` need.

    Without this context, autocast would cast again what was cast on purpose, cuBLAS might add the
    parts of a split reduction in bfloat16, and Triton would launch on the current device.
    """
    no_autocast = torch.autocast(hidden.device.type, enabled=False)
    with whole_sums, no_autocast, torch.cuda.device_of(hidden):  # device_of skips CPU tensors
        yield
