"""Bytes that stay for a whole run: weights, gradients, the optimizer's state and copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import Config
from aepo_fast.memory.shards import own_numbers
from aepo_fast.model.policy import Policy
from aepo_fast.rollout.packed_linear import can_pack
from aepo_fast.training.offload import PART_BYTES

# Bits of a weight in NF4: a block of 64 has a scale of 8 bits, and 256 scales one of 32.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
# Bytes for each number of the largest weight while an optimizer steps, by its name and whether it
# rounds by chance: the growth of a process's peak in a step of one weight of 28 to 44 million
# numbers, of adamw_8bit in bench/results/cpu/memory-*.json.
_STEP_ON_CPU = {
    ("adamw", False): 0,
    ("adamw_8bit", False): 56,
    ("adamw_8bit", True): 60,
    ("adamw_bf16", True): 41,
    ("muon", False): 12,
}
# Compiled, torchao's step keeps both new averages in float32 at most. Not measured.
_STEP_ON_GPU = {"adamw_8bit": 8, "adamw_bf16": 8, "muon": 12}


@dataclass(frozen=True)
class StateBytes:
    """Bytes by what they hold; the counts are of numbers.

    weights: with buffers. gradients: of all trained weights at once. optimizer: with float32 copies
    of the weights. step: the most that the optimizer makes and frees while it steps. reference: a
    second model for loss.kl_coef. loading: what the sampler's copy takes more while it is made.
    sampler: weights that sample beside the trained ones. optimizer_part: what of the state is on a
    GPU at once where it lies in CPU memory. largest_layer: weights of the largest layer.
    outside_layers: of no layer, e.g. the embedding.
    """

    weights: int
    gradients: int
    optimizer: int
    step: int
    reference: int
    loading: int
    sampler: int
    optimizer_part: int
    largest_layer: int
    outside_layers: int
    num_weights: int
    num_trained: int


def state_bytes(cfg: Config, policy: Policy, part: Policy | None = None) -> StateBytes:
    """Bytes of a run's states, of several processes those of one.

    policy: of the whole model, fake. part: of a model as `shards.split_config` has it, whose shards
    the process holds; None is the whole model.
    """
    model, machine = (part or policy).model, policy.machine
    parameters = list(model.parameters())
    trained = [one for one in parameters if one.requires_grad]
    quantized = _quantized(cfg, model)

    def numbers(weight: torch.Tensor) -> int:
        return own_numbers(weight, machine)

    def size(weight: torch.Tensor) -> int:
        return numbers(weight) * weight.element_size()

    weights = sum(map(_bytes, model.buffers()))
    for one in parameters:
        weights += round(one.numel() * NF4_BITS / 8) if id(one) in quantized else size(one)
    kind = cfg.trainer.optimizer
    stepped = [one for one in trained if kind != "muon" or _is_inner(one, policy)]
    largest = max(map(numbers, stepped), default=0)
    by_chance = any(one.dtype == torch.bfloat16 for one in trained) and kind != "adamw"
    step = _STEP_ON_GPU.get(kind, 0) if machine.is_gpu else _STEP_ON_CPU[kind, by_chance]
    needs_copy = cfg.loss.kl_coef > 0 and not cfg.model.lora.rank
    layers = [
        sum(one.numel() for one in module.parameters())
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer)
    ]
    optimizer, held = (
        sum(_optimizer(one, numbers(one), kind, policy) for one in trained),
        sum(map(size, trained)),
    )
    at_once = max(PART_BYTES, max(map(size, trained), default=0))
    sampler, loading = _sampler(cfg, machine, policy.model, weights)
    everything = list(policy.model.parameters())
    return StateBytes(
        weights=weights,
        gradients=sum(numbers(one) * gradient_width(one, kind) for one in trained),
        optimizer=optimizer,
        step=largest * step,
        reference=weights if needs_copy else 0,
        loading=loading,
        sampler=sampler,
        optimizer_part=round(optimizer * min(1, at_once / max(held, 1))),
        largest_layer=max(layers, default=0),
        outside_layers=sum(one.numel() for one in parameters) - sum(layers),
        num_weights=sum(one.numel() for one in everything),
        num_trained=sum(one.numel() for one in everything if one.requires_grad),
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def gradient_width(weight: torch.Tensor, kind: str) -> int:
    """Bytes of each number of a weight's gradient, by the optimizer's name."""
    # Float32 copies of bfloat16 weights have the gradients.
    return 4 if kind == "adamw" else weight.element_size()


def _optimizer(weight: torch.Tensor, count: int, kind: str, policy: Policy) -> int:
    width = weight.element_size()
    if kind == "adamw":
        return count * (8 if width == 4 else 12)
    if kind == "adamw_bf16":
        return count * 2 * width
    if kind == "muon":
        return count * (4 if _is_inner(weight, policy) else 8)
    if count < 4096 or count % 256:  # torchao leaves small ones as they are
        return count * 2 * width
    return 2 * (count + 4 * count // 256 + 4 * 256)


def _is_inner(weight: torch.Tensor, policy: Policy) -> bool:
    """Whether Muon steps it: a matrix of a layer."""
    ends = {id(policy.weight), id(policy.model.get_input_embeddings().weight)}
    return weight.ndim == 2 and id(weight) not in ends


def _quantized(cfg: Config, model: nn.Module) -> set[int]:
    """Weights that are held in four bits: those of linear layers other than the head."""
    if cfg.model.quantization == "none":
        return set()
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name
    }


def _sampler(cfg: Config, machine: Machine, model: nn.Module, weights: int) -> tuple[int, int]:
    """Bytes of the sampler's own weights, and what it takes more while they are made.

    weights: bytes that the process holds of those that are trained.
    """
    width = machine.rollout_dtype.itemsize
    numbers = sum(one.numel() for one in model.parameters())
    shared = machine.rollout_dtype == machine.weights_dtype
    if cfg.rollout.backend == "vllm":
        on_gpu = machine.is_gpu
        views = on_gpu and shared and cfg.rollout.share_weights and not cfg.rollout.steps_ahead
        views = views and not cfg.model.lora.rank and machine.world.size == 1
        return (0 if views else numbers * width // cfg.rollout.tensor_parallel), 0
    if machine.world.size > 1:  # a model of its own, which comes first and is then cast
        packed = _packed(machine, model)
        own = sum(map(_bytes, model.parameters()))
        kept = numbers * width + packed
        return kept, 0 if machine.is_gpu else max(0, own - kept - weights)
    packed = _packed(machine, model)
    # The copy is whole before its numbers get their dtype, one weight after the other.
    copied = 0 if shared else numbers * width
    return copied + packed, 0 if shared else max(0, weights - copied - packed)


def _packed(machine: Machine, model: nn.Module) -> int:
    """Bytes of the second copy of linear layers' weights with which a CPU samples."""
    if machine.is_gpu or not can_pack(machine.rollout_dtype):
        return 0
    linears = (one for one in model.modules() if isinstance(one, nn.Linear))
    return machine.rollout_dtype.itemsize * sum(one.weight.numel() for one in linears)
