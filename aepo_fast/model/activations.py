"""What of a model's activations is kept for the backward pass, and where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.model import Checkpointing

_LEAST_BYTES = 2**16  # of what is moved: below it, a copy costs more than its bytes are worth
_OF_WEIGHTS = ("TBackward0", "ToCopyBackward0")  # what a linear layer makes of its weight


def checkpoint_layers(model: PreTrainedModel, wanted: Checkpointing) -> None:
    """Let layers keep only their inputs and compute all else again in the backward pass.

    wanted: "full" for all layers, "none" for none. With a number n the layers 0, n, 2n and so on do
    so, and the others keep their activations. Raises ConfigError where a model has no such layers.
    """
    if wanted == "none":
        return
    name = "activation_checkpointing_enable"  # transformers 5.17 has the older name alone
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if wanted == "full":
        return
    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    if not layers:
        reason = f"the layers of {type(model).__name__} cannot be chosen one by one"
        raise ConfigError("model.gradient_checkpointing", wanted, reason, 'Use "full" or "none"')
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index % wanted == 0


class OffloadedActivations(torch.autograd.graph.saved_tensors_hooks):
    """While it is open, what autograd saves goes to the CPU, and comes back in the backward pass.

    torch's save_on_cpu does so with weights, too, although they stay on the GPU in any case. Here
    weights, what autocast keeps of them and small tensors stay. All that is moved comes back with
    its strides, so that gradients stay bit for bit what they were. From a GPU to pinned memory and
    back, copies run in order with the other work of the stream.
    """

    def __init__(
        self,
        *,
        least_bytes: int = _LEAST_BYTES,
        on_copy: Callable[[Tensor], None] = lambda copy: None,
    ) -> None:
        """least_bytes: smaller tensors stay. on_copy: is called with each copy on the CPU."""
        self.least_bytes, self.on_copy = least_bytes, on_copy
        super().__init__(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if tensor.nbytes < self.least_bytes or _is_of_a_weight(tensor):
            return tensor
        on_gpu = tensor.is_cuda
        copy = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu)
        self.on_copy(copy)
        return tensor.device, copy.copy_(tensor, non_blocking=on_gpu)


def _is_of_a_weight(tensor: Tensor) -> bool:
    """Whether a tensor is a weight, its transpose, or the cast of one that is trained."""
    if isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
        return True
    node: Any = tensor.grad_fn
    while node is not None and node.name() in _OF_WEIGHTS:
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)


def _unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, copy = packed
    return copy.to(device, non_blocking=True)
