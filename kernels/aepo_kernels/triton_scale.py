# The bodies of kernels are Triton, whose launches and operators are not Python's:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
"""A gradient times a factor that lies on the GPU, without a pass over it where that is 1."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _PROGRAMS = 2048, 1024


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """values * factor in place; factor: one number. values: contiguous."""
    assert values.is_contiguous(), "gradients are allocated contiguous"
    num_programs = min(_PROGRAMS, triton.cdiv(values.numel(), _BLOCK))
    if num_programs:
        scale_kernel[(num_programs,)](
            values, factor, values.numel(), num_programs * _BLOCK, BLOCK=_BLOCK, num_warps=4
        )
    return values


@triton.jit
def scale_kernel(values, factor, size, stride, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, size, stride):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < size
            value = tl.load(values + offsets, mask=inside, other=0.0).to(tl.float32)
            tl.store(values + offsets, (value * by).to(values.dtype.element_ty), mask=inside)
