"""peft's linear layers with an adapter, computed in fewer passes over the activations.

peft adds an adapter by autograd's own operations: it casts the input to the adapter's dtype, scales
the product and adds it to the layer's output, each in a pass of its own whose result is kept for
the backward pass. Here the second GEMM adds to the output in place, and the input is kept once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

ADAPTER_NAME = "default"  # of the one adapter


class _AddLowRank(torch.autograd.Function):
    """output + scale * x A^T B^T, in the place of `output` and in its dtype."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """output: [..., O]; x: [..., I]; a: [R, I]; b: [O, R]."""
        dtype = output.dtype
        with torch.autocast(output.device.type, enabled=False):
            rows, low_a, low_b = x.flatten(0, -2).to(dtype), a.to(dtype), b.to(dtype)
            inner = rows @ low_a.T  # [T, R]
            output.view(-1, output.shape[-1]).addmm_(inner, low_b.T, alpha=scale)
        ctx.mark_dirty(output)
        ctx.save_for_backward(rows, inner, a, b)
        ctx.scale, ctx.x_dtype = scale, x.dtype
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of output, x, a and b."""
        rows, inner, a, b = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            flat = grad.flatten(0, -2)  # [T, O]
            d_inner = (flat @ b.to(flat.dtype)).mul_(ctx.scale)  # [T, R]
            d_x = None
            if ctx.needs_input_grad[1]:
                d_x = (d_inner @ a.to(flat.dtype)).to(ctx.x_dtype)
                d_x = d_x.view(*grad.shape[:-1], a.shape[1])
            d_a = (d_inner.T @ rows).to(a.dtype)
            d_b = (flat.T @ inner).to(b.dtype).mul_(ctx.scale)
        return grad, d_x, d_a, d_b, None


def fuse_adapters(model: PreTrainedModel) -> None:
    """Let the linear layers of a model that have an adapter compute it in fewer passes.

    Layers of other kinds, e.g. GPT-2's, stay as peft has them.
    """
    from peft.tuners.lora import Linear

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters or self.merged or args or kwargs:
            return Linear.forward(self, x, *args, **kwargs)
        a, b = self.lora_A[ADAPTER_NAME].weight, self.lora_B[ADAPTER_NAME].weight
        return _AddLowRank.apply(self.base_layer(x), x, a, b, self.scaling[ADAPTER_NAME])

    members = {"forward": forward, "__module__": Linear.__module__}
    fused = type(Linear.__name__, (Linear,), members)
    for module in model.modules():
        if type(module) is Linear and isinstance(module.get_base_layer(), torch.nn.Linear):
            module.__class__ = fused
