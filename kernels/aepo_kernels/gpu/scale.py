# The bodies of kernels are Triton, whose launches and operators are not Python's:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
"""A gradient times a factor that is on the GPU: one pass, or no pass where the factor is 1."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a block, and the most programs. bench/results/h200/launches-20261126-2.json times this
# kernel at five sizes from 1,024 to 65,536, within 7 % of each other ("scale").
_BLOCK, _PROGRAMS = 2048, 2048


def scale(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply a gradient by one number, in float32, and round the result to `dtype`.

    values: contiguous, any shape. factor: [] or [1] on the same device. Where values have the
    `dtype` already, the result overwrites them, and a factor of 1 writes nothing.
    """
    assert values.is_contiguous(), "gradients are allocated contiguous"
    out = values if values.dtype == dtype else torch.empty_like(values, dtype=dtype)
    num_programs = min(_PROGRAMS, triton.cdiv(values.numel(), _BLOCK))
    if num_programs:
        scale_kernel[(num_programs,)](
            values,
            out,
            factor,
            values.numel(),
            num_programs * _BLOCK,
            IN_PLACE=out is values,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out


@triton.jit
def scale_kernel(values, out, factor, size, stride, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0 or not IN_PLACE:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, size, stride):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < size
            value = tl.load(values + offsets, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + offsets, (value * by).to(out.dtype.element_ty), mask=inside)
