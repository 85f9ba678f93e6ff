"""A GPU's GEMMs on a CPU: half-precision operands, float32 sums, and results of either dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from aepo_kernels import backends
from aepo_kernels.gemm import Gemms
from aepo_kernels.head import plan


class GpuGemms(Gemms):
    """Multiplies as cuBLAS does: every result is rounded once."""

    def matmul(
        self,
        left: Tensor,
        right: Tensor,
        dtype: torch.dtype | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        assert left.dtype == right.dtype, "cuBLAS has no GEMM of two dtypes"
        product = (left.float() @ right.float()).to(dtype or left.dtype)
        return product if out is None else out.copy_(product)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> Tensor:
        assert left.dtype == right.dtype, "cuBLAS has no GEMM of two dtypes"
        return total.copy_(total + left.float() @ right.float())


@contextmanager
def float16_as_on_a_gpu() -> Iterator[None]:
    """A context in which float16 logits and their gradient are float16, as on a GPU."""
    upcasts, gemms_for = backends.upcasts_gemms, plan.gemms_for

    def narrow(hidden: Tensor) -> bool:
        return hidden.dtype != torch.float16 and upcasts(hidden)

    def gpu_gemms(hidden: Tensor, budget: plan.Budget) -> Gemms:
        if hidden.dtype != torch.float16:
            return gemms_for(hidden, budget)
        size = budget.gemm_block_bytes
        return GpuGemms(in_cpp=False, upcast=False, writes_float32=True, block_bytes=size)

    with (
        patch.object(backends, "upcasts_gemms", narrow),
        patch.object(plan, "gemms_for", gpu_gemms),
    ):
        yield
