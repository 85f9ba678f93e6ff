"""Bytes of activations in a pass over a micro-batch, by tracing the run's own model.

A model of a few layers is traced, and its bytes are extrapolated: each further layer adds the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import Config
from aepo_fast.memory.fake_model import fake_policy, layer_period, num_layers, with_layers
from aepo_fast.memory.live_storages import LiveStorages
from aepo_fast.model.batch import Element, MicroBatch, split_elements
from aepo_fast.model.policy import Policy
from aepo_fast.report.unexpected import first_line
from aepo_fast.samples import Completion, Sample
from aepo_fast.training.optim import MasterAdamW, build_optimizer


class UntraceableError(ConfigError):
    """A model whose operations depend on the numbers they are given, e.g. to choose experts."""


@dataclass(frozen=True)
class Shape:
    """What a minibatch holds: so many groups of samples, all of the same lengths in tokens."""

    prompts: int
    group_size: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class PassBytes:
    """Bytes of a pass beside weights, gradients of other micro-batches, and the head.

    kept: alive at the end of the forward pass. forward: the most in it. backward: the most in the
    last layers' backward pass, where all activations are there. bottom: the most in that of the
    first layers, where all gradients are. In between, bytes go from one to the other. score: the
    most in a forward pass without a gradient. lines, width: the micro-batch's shape. tokens:
    completion tokens whose hidden states it gives. again: 1 where gradients of other micro-batches
    are there already, else 0.
    """

    kept: int
    forward: int
    backward: int
    bottom: int
    score: int
    lines: int
    width: int
    tokens: int
    again: int


def pass_bytes(
    cfg: Config, machine: Machine, config: PretrainedConfig, samples: Sequence[Sample]
) -> PassBytes:
    """Trace the largest micro-batch of some samples through a model with settings `config`.

    Raises ConfigError for a model that cannot be built from its settings, and UntraceableError for
    one whose pass cannot be traced.
    """
    try:
        return _pass_bytes(cfg, machine, config, samples)
    except ConfigError:
        raise
    except Exception as error:  # of any model's code
        reason = f"a pass of {config.model_type} cannot be traced without numbers"
        fix = "Measure it: aepo-fast plan --measure, or train"
        error_text = f"{reason}: {first_line(error)}"
        raise UntraceableError("model.path", cfg.model.path, error_text, fix) from error


def _pass_bytes(
    cfg: Config, machine: Machine, config: PretrainedConfig, samples: Sequence[Sample]
) -> PassBytes:
    total, period = num_layers(config), layer_period(config, cfg)
    few = period + total % period
    if few + 2 * period >= total:
        return _traced(cfg, machine, config, samples)
    few, many = few + (period == 1), few + period + (period == 1)
    one, two = (_traced(cfg, machine, with_layers(config, n), samples) for n in (few, many))
    share = (total - few) / (many - few)

    def grown(name: str) -> int:
        low, high = getattr(one, name), getattr(two, name)
        return round(low + (high - low) * share)

    return PassBytes(**{item.name: grown(item.name) for item in fields(PassBytes)})


def _traced(
    cfg: Config, machine: Machine, config: PretrainedConfig, samples: Sequence[Sample]
) -> PassBytes:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    policy = fake_policy(cfg, machine, config, mode, gathered=machine.world.size > 1)
    with mode:
        batch, count = _largest(policy, samples)
        score = _score(policy, batch)
        counter = LiveStorages(512 if policy.machine.is_gpu else 64)
        _prepare(cfg, policy, counter, again=count > 1)
        if policy.activation_offloading:  # what is kept on the CPU takes nothing of the device
            policy.on_offloaded = counter.exclude
        _run(policy, batch, counter, period=layer_period(config, cfg))
    peaks = counter.peaks
    lines, width = batch.input_ids.shape
    return PassBytes(
        kept=peaks["kept"],
        forward=peaks["forward"],
        backward=max(peaks["backward"], peaks["kept"]),
        bottom=peaks.get("bottom", 0),
        score=score,
        lines=lines,
        width=width,
        tokens=len(batch.targets),
        again=int(count > 1),
    )


def _score(policy: Policy, batch: MicroBatch) -> int:
    counter = LiveStorages(512 if policy.machine.is_gpu else 64)
    counter.ignore([*policy.model.parameters(), *policy.model.buffers()])
    with torch.no_grad(), counter, policy.same_weights():
        policy.hidden(batch)
    return counter.peak


def _run(policy: Policy, batch: MicroBatch, counter: LiveStorages, *, period: int) -> None:
    with counter, policy.same_weights():
        handles = _watch_layers(policy, counter, period)
        counter.begin("forward")
        hidden = policy.hidden(batch)
        counter.begin("kept")
        if hidden.requires_grad:
            gradient = torch.empty_like(hidden)
            counter.begin("backward")
            hidden.backward(gradient)
        counter.begin("")
    for handle in handles:
        handle.remove()


def _prepare(cfg: Config, policy: Policy, counter: LiveStorages, *, again: bool) -> None:
    """Take what is no part of a pass out of the count, and out of the graph what the head owns."""
    model = policy.model
    embedding: Any = model.get_input_embeddings()
    in_shards = policy.machine.world.size > 1
    if embedding.weight.requires_grad and (embedding.sparse or in_shards):
        # Its gradient is rows of the head's, which a fake tensor cannot be, or counted apart.
        embedding.weight.requires_grad_(False)
        embedding.register_forward_hook(lambda module, args, out: out.requires_grad_())
    parameters = list(model.parameters())
    if in_shards:  # those of a layer are counted apart, too
        for one in parameters:
            if one.requires_grad:
                one.register_post_accumulate_grad_hook(_forget_gradient)
        counter.ignore([*parameters, *model.buffers()])
        return
    holders = dict(zip(parameters, parameters, strict=True))  # of gradients
    optimizer = build_optimizer(model, cfg.trainer) if _holds_copies(cfg, policy) else None
    if isinstance(optimizer, MasterAdamW):  # its hooks turn gradients into those of its copies
        holders |= dict(zip(optimizer.rounded, optimizer.masters, strict=True))
    counter.ignore([*parameters, *model.buffers(), *holders.values()])
    for parameter, holder in holders.items():
        if parameter.requires_grad and (again or parameter is policy.weight):
            holder.grad = torch.empty_like(holder)
            counter.ignore([holder.grad])


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _holds_copies(cfg: Config, policy: Policy) -> bool:
    trained = [one for one in policy.model.parameters() if one.requires_grad]
    return cfg.trainer.optimizer == "adamw" and any(x.dtype != torch.float32 for x in trained)


def _watch_layers(policy: Policy, counter: LiveStorages, period: int) -> list[RemovableHandle]:
    """Tell the backward pass of the last layers from that of the first ones, `period` of each."""
    layers = _layers(policy.backbone, num_layers(policy.model.config))
    if layers is None or len(layers) <= period:
        return []
    # Once the gradient of what a layer takes is there, the layers below it follow.
    begins = {len(layers) - period: "middle", period: "bottom"}
    return [
        layers[index].register_forward_pre_hook(_begins(counter, name), with_kwargs=True)
        for index, name in begins.items()
    ]


def _begins(counter: LiveStorages, name: str) -> Callable[..., None]:
    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        if isinstance(states, Tensor) and states.requires_grad:
            states.register_hook(lambda gradient: counter.begin(name))

    return watch


def _layers(backbone: nn.Module, count: int) -> nn.ModuleList | None:
    lists = (one for one in backbone.modules() if isinstance(one, nn.ModuleList))
    return next((one for one in lists if len(one) == count), None)


def _largest(policy: Policy, samples: Sequence[Sample]) -> tuple[MicroBatch, int]:
    """The largest micro-batch of samples, in fake tensors, and how many there are."""
    batches = split_elements(
        samples,
        range(len(samples)),
        layout=policy.layout,
        max_tokens=policy.max_tokens,
        batch_tokens=policy.batch_tokens,
    )

    def size(batch: list[Element]) -> int:
        lengths = [element.length for element in batch]
        return sum(lengths) if policy.layout == "packed" else len(batch) * max(lengths)

    batch = max(batches, key=size)
    packed = policy.layout == "packed"
    lines = 1 if packed else len(batch)
    width = size(batch) // lines
    mask = None
    if any(len(element.samples) > 1 for element in batch):
        mask = torch.empty(lines, 1, width, width, dtype=torch.bool)
    elif not packed:
        mask = torch.empty(lines, width, dtype=torch.long)
    ids = torch.empty(lines, width, dtype=torch.long)
    tokens = sum(samples[index].length for element in batch for index in element.samples)
    some = torch.empty(tokens, dtype=torch.long)
    return MicroBatch(ids, torch.empty_like(ids), mask, some, some, some, ()), len(batches)


def samples_of(shape: Shape) -> Sequence[Sample]:
    """Samples of the shape's lengths, as micro-batches are made of."""
    new = shape.new_tokens
    samples = []
    for group in range(shape.prompts):
        prompt = (group, *(0,) * (shape.prompt_tokens - 1))
        done = Completion(prompt, (0,) * new, (0.0,) * new, "length", 1.0, 0)
        samples += [Sample(done, group, False, 0.0)] * shape.group_size
    return samples
