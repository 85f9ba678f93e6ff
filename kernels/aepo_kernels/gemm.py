"""The GEMMs: operands in the model's dtype, accumulation in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

# Bytes of a product that is made and added to a wider sum at a time, while it is cached.
_BLOCK_BYTES = 2**21


def matmul(
    left: Tensor, right: Tensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None
) -> Tensor:
    """left @ right in `dtype`, or in the operands'; accumulated in fp32 and rounded once.

    Another dtype than the operands' is float32 from bfloat16, which CUDA alone can do. `out` is of
    the operands' dtype.
    """
    if dtype is None or dtype == left.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, in place and accumulated in total's dtype."""
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
    """left @ right in `dtype`, rounded to the operands' dtype first where there is no GPU."""
    if dtype == left.dtype:
        return matmul(left, right, out=out)
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
    space = left.new_empty(min(size, count), width)
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        yield rows, torch.mm(left[rows], right, out=space[: rows.stop - start])


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """What GEMMs and kernels need around them.

    Without it, autocast would cast again what was cast on purpose, cuBLAS might add the parts of a
    split reduction in bfloat16, and Triton would launch on the current device.
    """
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with torch.autocast(device.type, enabled=False), on_device:
            yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before
