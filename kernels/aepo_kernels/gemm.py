"""The GEMMs: operands in the model's dtype, accumulation in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right; from bfloat16 operands float32 on CUDA, and bfloat16 on the CPU.

    The CPU has no bfloat16 GEMM with float32 output. It accumulates in float32 and rounds once.
    """
    if _widens(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)


def add_outer(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left.T @ right, in place where there is a total; accumulated in `dtype`."""
    if total is None:
        return matmul(left.T, right).to(dtype)
    if _widens(left):
        return torch.addmm(total, left.T, right, out_dtype=dtype, out=total)
    if left.dtype == dtype:
        return total.addmm_(left.T, right)
    return total.add_(torch.mm(left.T, right))


def _widens(operand: Tensor) -> bool:
    return operand.is_cuda and operand.dtype == torch.bfloat16
