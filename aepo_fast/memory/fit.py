"""Which settings fit a device: the largest ones, and the cheapest changes of those that do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from transformers import PretrainedConfig

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.over_ranks import check_over_ranks, check_parts
from aepo_fast.config.resolve import Machine, check_no_offloading, machine_on
from aepo_fast.config.sections import Config
from aepo_fast.config.toml import with_overrides
from aepo_fast.memory.plan import Device, MemoryPlan, plan_memory
from aepo_fast.model.tensor_parallel import check_tensor_parallel
from aepo_fast.world import World

Planner = Callable[[Config], MemoryPlan]

_MOST_TRIES = 24  # half a second each
_FEWEST_TOKENS = 1024  # of a micro-batch: fewer leave a device waiting
_SIZES = [2**power for power in range(7, 18)]
# What is the larger the more weights a model has.
_GROWING = ("weights", "optimizer", "gradients", "reference", "sampler", "gathered", "holes")


@dataclass(frozen=True)
class Change:
    """Settings as `--set` takes them, and the plan with them.

    devices: of more processes, where it is they that help; None of as many as there are.
    """

    settings: tuple[str, ...]
    plan: MemoryPlan
    devices: int | None = None


def gib(size: int) -> str:
    """Bytes as a text in GiB."""
    return f"{size / 2**30:.1f} GiB"


def planner(
    config: PretrainedConfig,
    device: Device,
    *,
    prompt_tokens: int | None,
    for_gpu: bool,
    devices: int = 1,
) -> Planner:
    """What plans a configuration of one model on one of so many devices, with a process each."""
    place = torch.device("cuda" if for_gpu else "cpu")

    def plan(cfg: Config) -> MemoryPlan:
        machine = machine_over(place, cfg, devices)
        check_tensor_parallel(cfg.trainer.tensor_parallel, config.get_text_config())
        if not for_gpu:
            check_no_offloading(cfg)
        settled = machine.settled(cfg)
        return plan_memory(settled, machine, config, device, prompt_tokens=prompt_tokens)

    return plan


def machine_over(device: torch.device, cfg: Config, devices: int) -> Machine:
    """The machine of a configuration whose run has so many processes; none of them need be there.

    Raises ConfigError for settings that such a run cannot have.
    """
    machine = machine_on(device, cfg)
    if devices > 1:
        check_over_ranks(cfg, "--devices")
    backend = "chunked" if machine.head_backend == "auto" else machine.head_backend
    check_parts(cfg, devices, backend, "Give a multiple of it by --devices")
    split = cfg.trainer.tensor_parallel
    return dataclasses.replace(
        machine,
        world=World(size=devices),
        data=World(size=devices // split),
        tensor_parallel=split,
        replicas=cfg.trainer.replicas,
    )


def changes_over(cfg: Config, over: Callable[[int], Planner], devices: int) -> list[Change]:
    """`cheapest_changes` of a run on so many GPUs; the last one may be to take more of them.

    over: what plans for a number of devices. They are twice, four times or eight times as many.
    """
    found = cheapest_changes(cfg, over(devices))
    for more in (2 * devices, 4 * devices, 8 * devices):
        change = _tried(cfg, over(more), ())
        if change is not None:
            return [*found[:2], dataclasses.replace(change, devices=more)]
    return found


def cheapest_changes(cfg: Config, plan: Planner, count: int = 3) -> list[Change]:
    """Up to `count` changes under which a run fits, the least slowdown first; each is planned.

    cfg: before `Machine.settled`. A change of two settings comes only where single ones are too
    few.
    """
    found: list[Change] = []
    options = list(_options(cfg))
    tries = [chosen for size in (1, 2, 3) for chosen in combinations(options, size)]
    for chosen in tries[:_MOST_TRIES]:
        settings = tuple(one for option in chosen for one in option)
        if any(set(one.settings) <= set(settings) for one in found):
            continue
        change = _tried(cfg, plan, settings)
        if change is not None:
            found.append(change)
        if len(found) == count:
            break
    return found


def _tried(cfg: Config, plan: Planner, settings: tuple[str, ...]) -> Change | None:
    keys = [one.split("=")[0] for one in settings]
    if len(set(keys)) < len(keys):
        return None
    try:
        made = plan(with_overrides(cfg, settings))
    except ConfigError:  # settings that do not go together, or do nothing here
        return None
    return Change(settings, made) if made.fits else None


def _options(cfg: Config) -> Iterator[tuple[str, ...]]:
    """Changes that save memory, by how much slower a step gets, the least first."""
    trainer, model, rollout = cfg.trainer, cfg.model, cfg.rollout
    # Sampler and optimizer: a step hardly takes longer.
    if rollout.backend == "vllm" and rollout.gpu_memory_utilization > 0.2:
        yield ("rollout.gpu_memory_utilization=0.2",)
    if trainer.optimizer == "adamw":
        yield ('trainer.optimizer="adamw_8bit"',)
    if model.dtype == "float32" and not model.lora.rank:
        yield 'model.dtype="bfloat16"', 'trainer.optimizer="adamw_8bit"'
    # More micro-batches read the weights more often.
    tokens = trainer.tokens_per_microbatch // 2
    while tokens >= _FEWEST_TOKENS:
        yield (f"trainer.tokens_per_microbatch={tokens}",)
        tokens //= 4
    if rollout.backend == "hf" and rollout.batch_rows > 64:
        yield ("rollout.batch_rows=64",)
    # The state crosses the bus twice an update.
    if trainer.offload == "none":
        yield ('trainer.offload="optimizer"',)
    # Other things are trained.
    if not model.lora.rank:
        yield "model.lora.rank=16", 'model.dtype="bfloat16"'
    elif model.dtype == "float32":
        yield ('model.dtype="bfloat16"',)
    if model.quantization == "none":
        lora = () if model.lora.rank else ("model.lora.rank=16",)
        dtype = ('model.dtype="bfloat16"',) if model.dtype == "float32" else ()
        yield *lora, *dtype, 'model.quantization="nf4"'
    # Layers are computed twice.
    if model.gradient_checkpointing == "none":
        yield ('model.gradient_checkpointing="full"',)
    if rollout.max_new_tokens > 256:
        yield (f"rollout.max_new_tokens={rollout.max_new_tokens // 2}",)


def largest(cfg: Config, plan: Planner, key: str, values: Sequence[int]) -> int | None:
    """The largest of ascending values of a setting with which a run fits; None where none does."""
    low, high = 0, len(values)  # values below low fit
    while low < high:
        middle = (low + high) // 2
        try:
            fits = plan(with_overrides(cfg, [f"{key}={values[middle]}"])).fits
        except ConfigError:
            fits = False
        low, high = (middle + 1, high) if fits else (low, middle)
    return values[low - 1] if low else None


def largest_settings(cfg: Config, plan: Planner) -> dict[str, int | None]:
    """The largest micro-batch and completion that fit, each alone, by key: powers of two."""
    keys = "trainer.tokens_per_microbatch", "rollout.max_new_tokens"
    return {key: largest(cfg, plan, key, _SIZES) for key in keys}


def largest_model(plan: MemoryPlan, num_weights: int) -> int:
    """About how many weights a model could have, were all else as it is."""
    grows = sum(size for name, size in plan.worst.parts.items() if name in _GROWING)
    spare = plan.device.memory - plan.needed + grows
    return max(0, round(num_weights * spare / grows))
