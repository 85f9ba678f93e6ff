"""The most bytes of each phase of a training step, by what holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import Config
from aepo_fast.memory.fake_model import fake_policy, num_layers
from aepo_fast.memory.head_pass import HeadBytes, head_bytes
from aepo_fast.memory.model_pass import PassBytes, Shape, pass_bytes
from aepo_fast.memory.offload import on_device
from aepo_fast.memory.shards import (
    Whole,
    score_moments,
    split_config,
    update_moments,
    whole_groups,
)
from aepo_fast.memory.states import StateBytes, gradient_width, state_bytes
from aepo_fast.model.kept import room
from aepo_fast.model.policy import Policy
from aepo_fast.samples import Sample

# What holds bytes, in the order of a bar.
PARTS = (
    "process",
    "weights",
    "optimizer",
    "gradients",
    "reference",
    "sampler",
    "gathered",
    "activations",
    "head",
    "cache",
    "holes",
)
# Bytes of a logit while transformers samples on a GPU: itself, twice float32, a float64 sum.
_SAMPLED_LOGIT = 20


@dataclass(frozen=True)
class Phase:
    """The most of a phase: bytes by part, those of PARTS that are there."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Traced:
    """What the phases are made of. whole: of one of several processes, None of one alone."""

    states: StateBytes
    activations: PassBytes
    head: HeadBytes
    whole: Whole | None = None


def trace(
    cfg: Config, machine: Machine, config: PretrainedConfig, samples: Sequence[Sample]
) -> Traced:
    """Trace a run's model of settings `config` over the largest micro-batch of some samples.

    Raises ConfigError for a model that cannot be built from its settings.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    policy = fake_policy(cfg, machine, config, mode)
    if machine.world.size > 1:
        return _trace_part(cfg, machine, config, samples, policy, mode)
    found = pass_bytes(cfg, machine, config, samples)
    trained = policy.weight.requires_grad
    with mode:
        states = state_bytes(cfg, policy)
        top_k = cfg.rollout.top_k
        kept = room(top_k, len(policy.weight)) if top_k else 0
        rows = round(found.tokens)
        head = head_bytes(policy.machine, policy.weight, rows, trained=trained, kept=kept)
        width = gradient_width(policy.weight, cfg.trainer.optimizer)
    head = replace(head, weight_grad=policy.weight.numel() * width if trained else 0)
    return Traced(states, found, head)


def _trace_part(
    cfg: Config,
    machine: Machine,
    config: PretrainedConfig,
    samples: Sequence[Sample],
    policy: Policy,
    mode: FakeTensorMode,
) -> Traced:
    """What the phases of one of several processes are made of. policy: of the whole model."""
    own = split_config(config, machine)
    part = policy if own is config else fake_policy(cfg, machine, own, mode)
    found = pass_bytes(cfg, machine, own, samples)
    tokens, trained = round(found.tokens), part.weight.requires_grad
    # vLLM gets weights in its own dtype.
    sampler = machine.rollout_dtype if cfg.rollout.backend == "vllm" else None
    with mode:
        states = state_bytes(cfg, policy, part)
        whole = whole_groups(part.model, part.machine, sampler=sampler)
        weight = torch.empty(part.weight.shape, dtype=machine.compute_dtype, device="cpu")
        head = head_bytes(part.machine, weight, tokens, trained=trained)
    return Traced(states, found, head, whole)


def phases(
    cfg: Config,
    machine: Machine,
    config: PretrainedConfig,
    shape: Shape,
    traced: Traced,
    *,
    process: int,
    holes: float,
    device_bytes: int,
) -> list[Phase]:
    """The phases of a run in order.

    process: what the process holds beside tensors. holes: what lies unused between gradients and
    the optimizer's state on a CPU, as their share; 0 on a GPU. device_bytes: memory of the device,
    of which vLLM takes a share.
    """
    states = on_device(cfg, machine, traced.states)
    traced = replace(traced, states=states)
    if not machine.is_gpu:
        process += _kept_ids(cfg, config.get_text_config().vocab_size)
    held = {"process": process, "weights": states.weights, "reference": states.reference}
    held["sampler"] = states.sampler
    loading = Phase("load", {**held, "activations": states.loading})
    held["optimizer"] = states.optimizer
    update = {**held, **update_bytes(traced, machine)}
    sampling = {**held, "optimizer": 0} if cfg.rollout.offload_optimizer else held
    found = [
        loading,
        _sample(cfg, machine, config, shape, sampling, device_bytes),
        Phase("score", {**held, **_score(traced, machine)}),
        Phase("update", update),
        Phase("step", {**held, "gradients": states.gradients, "activations": states.step}),
    ]
    if traced.whole is not None:
        found.append(Phase("sync", {**held, "gathered": traced.whole.sent}))
    # A CPU's malloc keeps what the update frees, in pieces too small for what the step makes.
    freed = min(update.get("activations", 0) + update.get("head", 0), states.step) if holes else 0
    return [
        replace(one, parts=_in_order(one.parts, holes, freed if one.name == "step" else 0))
        for one in found
    ]


def _kept_ids(cfg: Config, vocab: int) -> int:
    """The int32 ids that were kept of a step's main tokens, and once more in micro-batches."""
    trainer, new = cfg.trainer, cfg.rollout.max_new_tokens
    each = room(cfg.rollout.top_k, vocab) if cfg.rollout.top_k else 0
    return 2 * 4 * each * trainer.prompts_per_step * trainer.group_size * new


def _in_order(parts: dict[str, int], holes: float, freed: int) -> dict[str, int]:
    parts["holes"] = freed + round(holes * (parts.get("optimizer", 0) + parts.get("gradients", 0)))
    return {name: round(parts[name]) for name in PARTS if parts.get(name)}


def _score(traced: Traced, machine: Machine) -> dict[str, int]:
    whole = traced.whole
    gathered = {} if whole is None else {"gathered": score_moments(whole, machine)}
    # The cast weights of the layers stay while the head's logits come and go.
    return {
        **gathered,
        "activations": round(traced.activations.score),
        "head": traced.head.score,
    }


def update_bytes(traced: Traced, machine: Machine) -> dict[str, int]:
    """The update's worst moment, by part: at the head, or at either end of the backward pass."""
    found, head, gradients = traced.activations, traced.head, traced.states.gradients
    if traced.whole is not None:
        return _worst(update_moments(traced.whole, machine, found, head, gradients))
    before = gradients if found.again else 0
    own = 0 if found.again else head.weight_grad
    moments = [
        {"activations": found.forward},
        {"activations": found.kept, "head": head.peak},
        {"activations": found.kept, "head": head.sums + head.result},
        {"activations": found.backward, "gradients": own},
        # Without others before, gradients grow here as activations go.
        {"activations": found.bottom, "gradients": own},
    ]
    if not found.again:
        moments[-1] = _split(found.bottom, own, gradients)
    else:
        moments = [{**one, "gradients": before} for one in moments]
    return _worst(moments)


def _worst(moments: Sequence[dict[str, int]]) -> dict[str, int]:
    worst = max(moments, key=lambda one: sum(one.values()))
    return {name: round(size) for name, size in worst.items()}


def _split(bottom: int, own: int, gradients: int) -> dict[str, int]:
    """The end of a backward pass, whose trace counts gradients and activations together."""
    total = bottom + own
    return {"gradients": min(gradients, total), "activations": max(0, total - gradients)}


def _sample(
    cfg: Config,
    machine: Machine,
    config: PretrainedConfig,
    shape: Shape,
    held: dict[str, int],
    device_bytes: int,
) -> Phase:
    if cfg.rollout.backend == "vllm":
        if not machine.is_gpu:
            cache = round(max(1, round(cfg.rollout.cpu_kv_cache_gib)) * 2**30)
            return Phase("sample", {**held, "cache": cache})
        share = round(cfg.rollout.gpu_memory_utilization * device_bytes)
        own = held["sampler"] or held["weights"]  # its weights are within its share
        return Phase("sample", {**held, "cache": max(0, share - own)})
    text, width = config.get_text_config(), machine.rollout_dtype.itemsize
    rows = min(cfg.rollout.batch_rows, shape.prompts * shape.group_size * cfg.trainer.minibatches)
    length = shape.prompt_tokens + shape.new_tokens
    layer = 2 * rows * length * _key_numbers(text) * width
    cache = layer * (num_layers(config) + 1)  # one more while it is copied
    logits = rows * text.vocab_size * (width + (_SAMPLED_LOGIT if machine.is_gpu else 0))
    return Phase("sample", {**held, "cache": cache, "head": logits})


def _key_numbers(text: Any) -> int:
    """Numbers of a token's keys in one layer."""
    heads = getattr(text, "num_attention_heads", None)
    if not heads:  # layers that keep a state of one size
        return 0
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return (getattr(text, "num_key_value_heads", None) or heads) * width
