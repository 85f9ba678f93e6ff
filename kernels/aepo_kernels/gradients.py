"""Accumulators of the head's gradients over chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from aepo_kernels.gemm import add_outer


class Gradients:
    """Gradients of hidden [N, H], weight [V, H] and bias [V], summed over chunks.

    Those of weight and bias are kept in `dtype` (fp32) however many chunks there are; where there
    is at most one, the GEMM writes the weight's as it is wanted. What is not needed is neither
    allocated nor computed.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, ...],
        dtype: torch.dtype,
        *,
        one_chunk: bool,
    ) -> None:
        needs_hidden, self.needs_weight, needs_bias = needs
        self.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        self.weight_dtype = weight.dtype if one_chunk and weight.dtype == hidden.dtype else dtype
        self.weight_shape, self.device = weight.shape, weight.device
        self.hidden = torch.zeros_like(hidden) if needs_hidden else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if needs_bias and bias is not None else None
        self.weight: Tensor | None = None  # made by the first chunk, which then need not add

    def add(self, dlogits: Tensor, weight: Tensor, inputs: Tensor, at: Tensor | slice) -> None:
        """Add a chunk: dlogits [C, V] and inputs [C, H] in one dtype, at rows `at` of hidden."""
        if self.hidden is not None:
            if isinstance(at, slice):
                torch.mm(dlogits, weight, out=self.hidden[at])
            else:
                self.hidden[at] = torch.mm(dlogits, weight)
        if self.needs_weight:
            self.weight = add_outer(self.weight, dlogits, inputs, self.weight_dtype)

    def finish(self, factor: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """The gradients times `factor`, in their inputs' dtypes; in place where those are equal."""
        if self.needs_weight and self.weight is None:
            self.weight = torch.zeros(
                self.weight_shape, dtype=self.weight_dtype, device=self.device
            )
        values = self.hidden, self.weight, self.bias
        return tuple(
            None if value is None else _scaled(value, factor, dtype)
            for value, dtype in zip(values, self.dtypes, strict=True)
        )


def _scaled(value: Tensor, factor: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    if factor is None:
        return value.to(dtype)
    if value.dtype == dtype:
        return value.mul_(factor)
    return torch.mul(value, factor, out=torch.empty_like(value, dtype=dtype))
