"""The GEMMs: operands in the model's dtype, accumulation in fp32.

A CPU without bfloat16 instructions would multiply bfloat16 numbers one by one, at a tenth to a
hundredth of its float32 speed. There GEMMs are upcast. Those in C++ (`cpu.gemm`) convert operands
to float32 as they pack them. Without C++, operands become float32 some rows at a time, while they
are cached. The product is rounded once, as elsewhere. float32 operands go by GEMMs in C++, too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from aepo_kernels import backends
from aepo_kernels.cpu import gemm as cpu_gemm
from aepo_kernels.ranges import slices

# Bytes of a product that is made and added to a wider sum at a time, while it is cached; and of
# some rows of an operand as float32. Not measured.
_BLOCK_BYTES = 2**21
# What GEMMs take: upcast ones three blocks and a small operand whole, those in C++ the packed
# blocks of two threads.
GEMM_BYTES = 2**23
# torch's switch that lets cuBLAS add the parts of a split reduction in bfloat16.
_REDUCED_SUMS = "allow_bf16_reduced_precision_reduction"


def matmul(
    left: Tensor, right: Tensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None
) -> Tensor:
    """left @ right in `dtype`, or in the operands'; accumulated in fp32 and rounded once.

    Another dtype than the operands' is float32 from bfloat16, which CUDA can do and upcast
    operands can; elsewhere `out` is of the operands' dtype.
    """
    if in_cpp(left) or is_upcast(left) or is_upcast(right):
        if out is None:
            shape = len(left), right.shape[1]
            out = torch.empty(shape, dtype=dtype or left.dtype, device=left.device)
        return _special(out, left, right)
    if dtype is None or dtype == left.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, in place and accumulated in total's dtype."""
    if in_cpp(left) or is_upcast(left) or is_upcast(right):
        return _special(total, left, right, add=True)
    if total.dtype == left.dtype:
        return total.addmm_(left, right)
    if total.is_cuda:
        return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    wide = None
    for rows, block in _blocks(left, right):
        wide = torch.empty_like(block, dtype=total.dtype) if wide is None else wide
        total[rows].add_(wide[: len(block)].copy_(block))  # add_ itself would make a new copy
    return total


def product(
    left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """left @ right in `dtype`; a CPU's bfloat16 GEMMs round it to bfloat16 first."""
    if dtype == left.dtype or is_upcast(left) or is_upcast(right):
        return matmul(left, right, dtype, out=out)
    if left.is_cuda:
        wide = matmul(left, right, dtype)
        return wide if out is None else out.copy_(wide)
    total = out
    if total is None:
        total = torch.empty(len(left), right.shape[1], dtype=dtype, device=left.device)
    for rows, block in _blocks(left, right):
        total[rows] = block
    return total


def _blocks(left: Tensor, right: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """left @ right some rows at a time, each until the next: on a CPU no GEMM writes wider."""
    count, width = len(left), right.shape[1]
    size = max(64, _BLOCK_BYTES // max(1, width * left.element_size()) // 64 * 64)
    workspace = left.new_empty(min(size, count), width)
    for rows in slices(count, size):
        yield rows, torch.mm(left[rows], right, out=workspace[: rows.stop - rows.start])


def is_upcast(operand: Tensor) -> bool:
    """Whether GEMMs of an operand go by float32."""
    return operand.dtype == torch.bfloat16 and not backends.multiplies_bfloat16(operand.device.type)


def in_cpp(operand: Tensor) -> bool:
    """Whether GEMMs of an operand are those of `cpu.gemm`."""
    if operand.device.type != "cpu" or not cpu_gemm.is_available():
        return False
    return operand.dtype == torch.float32 or is_upcast(operand)


def _special(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> Tensor:
    """left @ right into `out`, or added to it, in C++ or by float32 blocks of the longest side.

    One of the operands may be float32 already.
    """
    if in_cpp(left):
        return cpu_gemm.multiply(out, left, right, add=add)
    (rows, inner), columns = left.shape, right.shape[1]
    if inner > max(rows, columns):
        _upcast_inner(out, left, right, add)
    elif columns > rows:
        _upcast_rows(out.T, right.T, left.T, add)
    else:
        _upcast_rows(out, left, right, add)
    return out


def _upcast_rows(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    (rows, inner), columns = left.shape, right.shape[1]
    size = _block_size(rows, max(inner, columns))
    workspace, product = _workspace_like(left, size), _workspace_like(out, size)
    right = right.float()
    for block in slices(rows, size):
        wide = _wide(left[block], workspace)
        if out.dtype == torch.float32:
            torch.addmm(out[block], wide, right, beta=float(add), out=out[block])
        elif add:
            out[block] += torch.mm(wide, right, out=product[: len(wide)])
        else:
            out[block] = torch.mm(wide, right, out=product[: len(wide)])


def _upcast_inner(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    (rows, inner), columns = left.shape, right.shape[1]
    total = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    size = _block_size(inner, max(rows, columns))
    lefts, rights = _workspace_like(left.T, size), _workspace_like(right, size)
    for block in slices(inner, size):
        some, others = _wide(left.T[block], lefts), _wide(right[block], rights)
        begun = block.start > 0 or (add and total is out)
        torch.addmm(total, some.T, others, beta=float(begun), out=total)
    if total is not out:
        out.add_(total) if add else out.copy_(total)


def _block_size(count: int, width: int) -> int:
    return min(max(1, count), max(64, _BLOCK_BYTES // (4 * max(1, width)) // 64 * 64))


def _workspace_like(matrix: Tensor, rows: int) -> Tensor:
    """Float32 memory for some rows of a matrix, laid out as they are."""
    columns = matrix.shape[1]
    if matrix.stride(0) == 1 and matrix.stride(1) > 1:
        return matrix.new_empty(columns, rows, dtype=torch.float32).T
    return matrix.new_empty(rows, columns, dtype=torch.float32)


def _wide(rows: Tensor, workspace: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float32 else workspace[: len(rows)].copy_(rows)


class _WholeSums:
    """A context in which cuBLAS adds the parts of a split reduction in float32, for all threads.

    The switch is the process's. So the first of those inside keeps what it was, and the last to
    leave puts that back, in whatever order threads come and go.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = getattr(torch.backends.cuda.matmul, _REDUCED_SUMS)
                self._allow(False)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._allow(self._before)

    @staticmethod
    def _allow(reduced: bool) -> None:
        settings = torch.backends.cuda.matmul
        # Set alone, it would also allow the splits that someone else has forbidden.
        split = getattr(settings, f"{_REDUCED_SUMS}_split_k", None)
        setattr(settings, _REDUCED_SUMS, reduced if split is None else (reduced, split))


# For GEMMs outside the kernels, too, that run in one thread while another is in the kernels.
whole_sums = _WholeSums()


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """What GEMMs and kernels need around them.

    Without it, autocast would cast again what was cast on purpose, cuBLAS might add the parts of a
    split reduction in bfloat16, and Triton would launch on the current device.
    """
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with whole_sums, torch.autocast(device.type, enabled=False), on_device:
        yield
