"""Linear layers whose weights lie as oneDNN's GEMMs read them, for a model that samples on a CPU.

A GEMM of few rows otherwise spends much of its time on laying the weights out, in every call.
float32 sums may be rounded differently, bfloat16 ones are not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aepo_kernels import multiplies_bfloat16


class PackedLinear(nn.Linear):
    """A linear layer with a second, packed copy of its weight; no gradient."""

    packed: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + b."""
        ops = torch.ops.mkldnn
        return ops._linear_pointwise(input, self.packed, self.bias, "none", [], "")

    def pack(self) -> None:
        """Lay the weight out again, after it has changed."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch and CPU have such GEMMs for weights of a dtype."""
    return (
        dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and (dtype == torch.float32 or multiplies_bfloat16("cpu"))
    )


def packed_linears(model: nn.Module) -> list[PackedLinear]:
    """Turn the linear layers of a model on a CPU, whose dtype `can_pack`, into packed ones."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    for linear in linears:
        linear.__class__ = PackedLinear
    return linears  # type: ignore[return-value]
