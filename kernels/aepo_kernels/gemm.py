"""The GEMMs: operands in the model's dtype, accumulation in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor


def matmul(left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """left @ right in `dtype`, or in the operands'; accumulated in fp32 and rounded once.

    Another dtype than the operands' is float32 from bfloat16, which CUDA alone can do.
    """
    if dtype is None or dtype == left.dtype:
        return torch.mm(left, right)
    return torch.mm(left, right, out_dtype=dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, in place and accumulated in total's dtype."""
    if total.dtype == left.dtype:
        return total.addmm_(left, right)
    if total.is_cuda:
        return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    return total.add_(torch.mm(left, right))  # no GEMM there writes wider than its operands


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`, rounded to the operands' dtype first where there is no GPU."""
    return matmul(left, right, dtype if left.is_cuda else None).to(dtype)


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
