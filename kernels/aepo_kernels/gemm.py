"""The GEMMs: operands in the model's dtype, accumulation in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def matmul(left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """left @ right in `dtype`, or in the operands'; accumulated in fp32 and rounded once.

    Another dtype than the operands' is float32 from bfloat16, which CUDA alone can do.
    """
    if dtype is None or dtype == left.dtype:
        return torch.mm(left, right)
    return torch.mm(left, right, out_dtype=dtype)


def add_outer(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left.T @ right, in place where there is a total; accumulated in `dtype`."""
    if left.dtype == dtype:
        return torch.mm(left.T, right) if total is None else total.addmm_(left.T, right)
    if not left.is_cuda:  # no GEMM with an output wider than its operands there
        product = torch.mm(left.T, right)
        return product.to(dtype) if total is None else total.add_(product)
    if total is None:
        return torch.mm(left.T, right, out_dtype=dtype)
    return torch.addmm(total, left.T, right, out_dtype=dtype, out=total)


@contextmanager
def exact_sums() -> Iterator[None]:
    """Keep cuBLAS from adding the parts of a split reduction in bfloat16."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before
