"""Accumulators of the head's gradients over chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from aepo_kernels.gemm import add_outer, matmul


class Gradients:
    """Gradients of hidden [N, H], weight [V, H] and bias [V], summed over chunks.

    Those of weight and bias are kept in `dtype` (fp32) however many chunks there are. What is not
    needed is neither allocated nor computed.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, ...],
        dtype: torch.dtype,
    ) -> None:
        needs_hidden, self.needs_weight, needs_bias = needs
        self.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        self.accumulator_dtype = dtype
        self.weight_shape, self.device = weight.shape, weight.device
        self.hidden = torch.zeros_like(hidden) if needs_hidden else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if needs_bias and bias is not None else None
        self.weight: Tensor | None = None  # made by the first chunk, which then need not add

    def add(self, dlogits: Tensor, weight: Tensor, inputs: Tensor, at: Tensor | slice) -> None:
        """Add a chunk: dlogits [C, V] and inputs [C, H] in one dtype, at rows `at` of hidden."""
        if self.hidden is not None:
            self.hidden[at] = matmul(dlogits, weight).to(self.hidden.dtype)
        if self.needs_weight:
            self.weight = add_outer(self.weight, dlogits, inputs, self.accumulator_dtype)

    def finish(self, factor: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """The gradients times `factor`, in place and in their inputs' dtypes."""
        if self.needs_weight and self.weight is None:
            self.weight = torch.zeros(
                self.weight_shape, dtype=self.accumulator_dtype, device=self.device
            )
        values = self.hidden, self.weight, self.bias
        if factor is not None:
            for value in values:
                if value is not None:
                    value.mul_(factor)
        return tuple(
            None if value is None else value.to(dtype)
            for value, dtype in zip(values, self.dtypes, strict=True)
        )
