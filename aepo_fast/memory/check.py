"""What a run is going to need, before its weights load: said beside what it takes, or refused."""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PretrainedConfig

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import Config
from aepo_fast.memory.devices import import_packages, this_device
from aepo_fast.memory.fit import Planner, changes_over, cheapest_changes, gib, planner
from aepo_fast.memory.model_pass import Shape, UntraceableError
from aepo_fast.memory.plan import Device, MemoryPlan, plan_memory, shape_of
from aepo_fast.model.load import read_config

# No prediction was so far above what was measured (bench/results/cpu/memory-*.json). A run is
# refused only where it would not fit even then.
MARGIN = 0.1
# Where all that is unknown is at most this share of the process, half of it is less than 5% off.
_SMALL = 0.08


@dataclass(frozen=True)
class Prediction:
    """Bytes at a run's peak, and the plan that says so; None where no plan was needed.

    peak: None where the model cannot be traced. Of several processes, that of the largest.
    """

    peak: int | None
    plan: MemoryPlan | None


def predict(
    cfg: Config, machine: Machine, folder: Path | str, *, prompt_tokens: int, given: Config
) -> Prediction:
    """Predict a run's peak, and refuse a run that cannot fit.

    cfg: has been through `Machine.settled`; given: before that. folder: of the model.
    prompt_tokens: of the longest prompt.

    Raises ConfigError where the plan needs more than `MARGIN` above what there is.
    """
    config = read_config(folder, trust_code=cfg.model.trust_remote_code)
    import_packages(cfg)
    device = _smallest_device(machine)
    known = config, device, prompt_tokens
    return machine.world.on_first(lambda: _predict(cfg, machine, folder, *known, given))


def _smallest_device(machine: Machine) -> Device:
    """The device of this process, or of several the one with the least room."""
    world, host = machine.world, socket.gethostname()
    sharing = world.gather(host).count(host)
    own = this_device(is_gpu=machine.is_gpu, ranks=world.size, sharing=sharing)
    found = world.gather(own)
    least, most = min(one.memory for one in found), max(one.process for one in found)
    return replace(found[0], memory=least, process=most)


def _predict(
    cfg: Config,
    machine: Machine,
    folder: Path | str,
    config: PretrainedConfig,
    device: Device,
    prompt_tokens: int,
    given: Config,
) -> Prediction:
    if device.counted:
        shape = shape_of(cfg, prompt_tokens, machine.data.size)
        most = _upper_bound(cfg, config, folder, shape)
        if most < _SMALL * device.process:
            return Prediction(device.process + most // 2, None)
    try:
        plan = plan_memory(cfg, machine, config, device, prompt_tokens=prompt_tokens)
    except UntraceableError as error:
        print(f"memory is not predicted: {error.reason}", file=sys.stderr)
        return Prediction(None, None)
    if cfg.trainer.check_memory and plan.needed > (1 + MARGIN) * device.memory:
        _refuse(plan, given, config, prompt_tokens, machine)
    return Prediction(plan.peak, plan)


def _upper_bound(cfg: Config, config: PretrainedConfig, folder: Path | str, shape: Shape) -> int:
    """Bytes that a run on a CPU cannot need more of beside the process, of a model with files."""
    files = sum(one.stat().st_size for one in Path(folder).iterdir() if one.is_file())
    text = config.get_text_config()
    names = ("hidden_size", "intermediate_size", "num_attention_heads")
    sizes = [getattr(text, name, None) for name in names]
    if None in sizes:
        return 2**62
    width, inner, heads = (int(size) for size in sizes if size is not None)
    samples = shape.prompts * shape.group_size
    length = shape.prompt_tokens + shape.new_tokens
    tokens = min(samples * length, max(cfg.trainer.tokens_per_microbatch, length))
    layer = 16 * width + 6 * inner + 4 * heads * length
    head = min(4 * tokens * text.vocab_size, 2**26)
    rows = min(cfg.rollout.batch_rows, samples * cfg.trainer.minibatches)
    cache = 2 * rows * length * width * (text.num_hidden_layers + 1)
    activations = 4 * (tokens * layer * (text.num_hidden_layers + 1) + cache)
    # Weights, gradients, two moments, a reference and two copies that sample, of bfloat16 files.
    return 2 * 7 * files + activations + 2 * head


def _refuse(
    plan: MemoryPlan,
    given: Config,
    config: PretrainedConfig,
    prompt_tokens: int,
    machine: Machine,
) -> None:
    device, size = plan.device, machine.world.size

    def again(devices: int) -> Planner:
        known = {"prompt_tokens": prompt_tokens, "for_gpu": machine.is_gpu}
        return planner(config, device, **known, devices=devices)

    if size > 1 and machine.is_gpu:
        changes = changes_over(given, again, size)
    else:  # on a CPU, more processes have less each
        changes = cheapest_changes(given, again(size))
    fix = "Use a smaller model"
    settings = [" with ".join(change.settings) for change in changes if change.settings]
    said = ["Set " + ", or ".join(settings)] if settings else []
    said += [f"start {one.devices} processes, on a GPU each" for one in changes if one.devices]
    if said:
        fix = ", or ".join(said)
    worst, each = plan.worst, f" in each of {size} processes" if size > 1 else ""
    raise ConfigError(
        "trainer.check_memory",
        True,
        f"the run would need {gib(plan.needed)} in the phase {worst.name!r}{each}, and there are "
        f"{gib(device.memory)}",
        f"{fix}; or set this to false to try it anyway, and see `aepo-fast plan`",
    )
