"""A finished gradient times the factors that the loss's own backward brings, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that are scaled at a time where the result has another dtype: a whole scaled copy of a weight
# is never made. Not measured.
_COPIED_ROWS = 512


def scale(value: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """value * factor in `dtype`; `value` is overwritten in any case.

    value: [V, H] or any other shape. factor: one number, []. Where value has the `dtype` already,
    the result is value itself.
    """
    if value.dtype == dtype:
        return value.mul_(factor)
    scaled = torch.empty_like(value, dtype=dtype)
    for part, block in zip(scaled.split(_COPIED_ROWS), value.split(_COPIED_ROWS), strict=True):
        part.copy_(block.mul_(factor))
    return scaled


def scale_rows(values: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Each row of values [N, H] times its factor, [N]: a new tensor in `dtype`, rounded once.

    A factor of 0 gives zeros, whatever the row holds.
    """
    scaled = torch.empty_like(values, dtype=dtype)
    torch.mul(values, factors[:, None], out=scaled)
    return scaled.masked_fill_((factors == 0)[:, None], 0)


def scale_unless_one(value: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` for a CPU: a factor of 1, the common case, costs nothing.

    To multiply a whole weight by one would take a CPU as long as a GEMM. On a GPU, reading the
    factor would wait for the device.
    """
    return value.to(dtype) if factor.item() == 1 else scale(value, factor, dtype)
