"""The prediction of a run's memory: what each phase needs, and whether that fits a device."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PretrainedConfig

from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import Config
from aepo_fast.memory.model_pass import PassBytes, Shape, samples_of
from aepo_fast.memory.phases import Phase, phases, trace


@dataclass(frozen=True)
class Device:
    """What a run has: bytes of memory, and those that the process takes beside tensors.

    counted: whether the process's bytes are within what is measured as the run's memory, as on a
    CPU. A GPU's context is not. holes: what an allocator holds unused: on a CPU as a share of
    gradients and the optimizer's state, on a GPU of all tensors.
    """

    memory: int
    process: int
    counted: bool
    holes: float = 0.0


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs: its phases' peaks, for samples of these lengths in tokens."""

    device: Device
    phases: tuple[Phase, ...]
    shape: Shape
    activations: PassBytes
    num_weights: int
    num_trained: int

    @property
    def worst(self) -> Phase:
        """The phase that needs the most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Bytes of the worst phase, as they are measured."""
        return self.worst.total

    @property
    def needed(self) -> int:
        """Bytes that the device must have, with what is not measured."""
        device = self.device
        beside = 0 if device.counted else device.process + round(device.holes * self.peak)
        return self.peak + beside

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.needed <= self.device.memory


def plan_memory(
    cfg: Config,
    machine: Machine,
    config: PretrainedConfig,
    device: Device,
    *,
    prompt_tokens: int | None = None,
) -> MemoryPlan:
    """Predict a run's memory, for a model of settings `config`, without its weights.

    cfg: has been through `Machine.settled`. prompt_tokens: of the longest prompt; None is
    rollout.max_prompt_tokens. All completions are taken to be as long as they may be.

    Raises ConfigError for a model that cannot be built from its settings.
    """
    shape = shape_of(cfg, prompt_tokens, machine.data.size)
    traced = trace(cfg, machine, config, samples_of(shape))
    found = phases(
        cfg,
        machine,
        config,
        shape,
        traced,
        process=device.process if device.counted else 0,
        holes=device.holes if device.counted else 0.0,
        device_bytes=device.memory,
    )
    states = traced.states
    counts = states.num_weights, states.num_trained
    return MemoryPlan(device, tuple(found), shape, traced.activations, *counts)


def shape_of(cfg: Config, prompt_tokens: int | None = None, ranks: int = 1) -> Shape:
    """The largest minibatch of a run, as far as it decides the size of a micro-batch.

    ranks: how many share it; then it is one rank's part.
    """
    trainer, prompt = cfg.trainer, prompt_tokens or cfg.rollout.max_prompt_tokens
    new = cfg.rollout.max_new_tokens
    prompts = -(-trainer.prompts_per_step // trainer.minibatches)
    group = trainer.group_size
    if ranks > 1:  # with fewer prompts than ranks, samples of one are parted
        group = group if prompts >= ranks else -(-prompts * group // ranks)
        prompts = -(-prompts // ranks)
    # Two full micro-batches tell all that more of them would.
    enough = math.ceil(2 * trainer.tokens_per_microbatch / (group * new)) + 1
    return Shape(min(prompts, enough), group, prompt, new)
