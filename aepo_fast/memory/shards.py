"""What one of several processes holds: its shards, and what is whole while a layer computes.

The moments of a pass follow from what FSDP2 of torch 2.13 keeps, and from the groups that
`model.sharded.shard` makes: each layer, and embedding, last norm and head together.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from aepo_fast.config.resolve import Machine
from aepo_fast.memory.head_pass import HeadBytes
from aepo_fast.memory.model_pass import PassBytes

_SUM = 4  # bytes of a number while gradients are added up over processes: float32
# What gloo holds in one more copy, which NCCL does not: what it gathers, and what it adds up.
_GLOO_COPIES = 1


@dataclass(frozen=True)
class Whole:
    """Numbers of a process's groups of weights while they are whole, padding included.

    layer: of the largest layer. outside: of all that is in no layer. trained_layer,
    trained_outside: those of them that have gradients. head, embedding: of these two, where they
    have gradients. shards: into how many parts a group goes. sent: bytes of the largest weight
    while it is gathered for the sampler.
    """

    layer: int
    outside: int
    trained_layer: int
    trained_outside: int
    head: int
    embedding: int
    shards: int
    sent: int


def num_shards(machine: Machine) -> int:
    """Into how many parts each weight goes, or each neighbour's part of it."""
    return machine.data.size // machine.replicas


def own_numbers(weight: torch.Tensor, machine: Machine) -> int:
    """Numbers of a process's shard of a weight, of which all but the last have equally many rows.

    Those of the last are filled up to as many. weight: whole, or a neighbour's part.
    """
    if weight.ndim == 0:
        return 1
    rows = -(-len(weight) // num_shards(machine))
    return rows * weight[0].numel() if len(weight) else 0


def split_config(config: PretrainedConfig, machine: Machine) -> PretrainedConfig:
    """The settings of a model that is as large as what each of some neighbours has of one.

    They are of the first, whose part of the vocabulary is the largest.
    """
    size = machine.tensor_parallel
    if size == 1:
        return config
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if getattr(text, "head_dim", None) is None:
        text.head_dim = text.hidden_size // text.num_attention_heads
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        number = getattr(text, name, None)
        if isinstance(number, int):
            setattr(text, name, -(-number // size))
    return config


def whole_groups(model: PreTrainedModel, machine: Machine, *, sampler: torch.dtype | None) -> Whole:
    """What is whole at times of a model, as `split_config` has it, of weights as they are held.

    sampler: the dtype that weights are gathered in for it; None is each weight's own.
    """
    count = num_shards(machine)

    def numbers(weights: list[nn.Parameter]) -> int:
        return count * sum(own_numbers(one, machine) for one in weights)

    def trained(weights: list[nn.Parameter]) -> list[nn.Parameter]:
        return [one for one in weights if one.requires_grad]

    layers = [
        list(module.parameters())
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer)
    ]
    inside = {id(one) for layer in layers for one in layer}
    outside = [one for one in model.parameters() if id(one) not in inside]
    ends: list[nn.Module] = [model.get_output_embeddings(), model.get_input_embeddings()]  # type: ignore[list-item]
    head, embedding = (numbers(trained([one.weight])) for one in ends)  # type: ignore[list-item]
    sent = [
        numbers([one]) * (one.element_size() if sampler is None else sampler.itemsize)
        for one in trained(list(model.parameters()))
    ]
    return Whole(
        layer=max(map(numbers, layers), default=0),
        outside=numbers(outside),
        trained_layer=max((numbers(trained(layer)) for layer in layers), default=0),
        trained_outside=numbers(trained(outside)),
        head=head,
        embedding=embedding,
        shards=count,
        sent=max(sent, default=0) * machine.tensor_parallel * (1 + _copies(machine)),
    )


def score_moments(whole: Whole, machine: Machine) -> int:
    """Bytes that are whole in a pass without gradients, besides what its layers make."""
    moments = _Moments(whole, machine)
    return max(moments.outside + moments.in_forward, moments.at_first)


def update_moments(
    whole: Whole, machine: Machine, found: PassBytes, head: HeadBytes, gradients: int
) -> list[dict[str, int]]:
    """The bytes of each moment of an update that may be its worst, by part.

    found, head: of a pass whose weights are whole, in the compute dtype. gradients: of all shards.
    """
    now = _Moments(whole, machine)
    before = gradients if found.again else 0
    # From the head on, its gradient stays till all of its group goes to the shards.
    held = now.outside + whole.head * now.width
    sums = whole.trained_layer * _SUM  # the layer before still has its own
    grads = whole.trained_layer * now.width
    last = whole.trained_outside * (now.width + _SUM)
    added = whole.trained_outside * _SUM
    adding = added * (1 + now.copies) + (added // whole.shards if found.again else 0)
    in_layer = held + now.layer + now.buffer + grads + sums
    return [
        {"gathered": now.at_first, "gradients": before},
        {
            "gathered": now.outside + now.in_forward,
            "activations": found.forward,
            "gradients": before,
        },
        {
            "gathered": now.outside + now.buffer,
            "activations": found.kept,
            "head": max(head.peak, head.sums + head.result),
            "gradients": before,
        },
        {"gathered": in_layer, "activations": found.backward, "gradients": before},
        {"gathered": in_layer, "activations": found.bottom, "gradients": gradients},
        # A layer's gradients go to the shards, the next layer's weights are there.
        {
            "gathered": held + now.buffer + sums * (1 + now.copies) + sums // whole.shards,
            "activations": found.kept,
            "gradients": before,
        },
        # Then that of the embedding is made, and the last group's go to the shards.
        {"gathered": held + sums + whole.embedding * now.width, "gradients": gradients},
        {"gathered": max(last, adding), "gradients": gradients},
    ]


class _Moments:
    """Bytes of whole weights: width: of a number. buffer: what a layer is gathered in."""

    def __init__(self, whole: Whole, machine: Machine) -> None:
        shared = whole.shards > 1
        self.width = machine.compute_dtype.itemsize
        self.copies = _copies(machine) if shared else 0
        self.layer, self.outside = whole.layer * self.width, whole.outside * self.width
        self.buffer = self.layer if shared else 0
        # A group is copied out of the buffer where it came together, which is kept until the next
        # group has come together in another.
        self.in_forward = self.buffer + max(self.layer, self.buffer * (1 + self.copies))
        self.at_first = self.outside * (1 + shared) + self.buffer * (1 + self.copies)


def _copies(machine: Machine) -> int:
    return 0 if machine.is_gpu or machine.world.size == 1 else _GLOO_COPIES
