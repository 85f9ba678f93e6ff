"""`aepo-fast plan`: what a run needs in memory, whether it fits, and what would make it fit."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import PretrainedConfig

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import machine_on, resolve_machine
from aepo_fast.config.sections import Config, ModelConfig
from aepo_fast.config.toml import load_config
from aepo_fast.memory.devices import import_packages, named_device, this_device
from aepo_fast.memory.fit import (
    Change,
    Planner,
    changes_over,
    cheapest_changes,
    gib,
    largest_model,
    largest_settings,
    planner,
)
from aepo_fast.memory.plan import MemoryPlan
from aepo_fast.model.load import check_model, read_config
from aepo_fast.model.lora import check_lora
from aepo_fast.model.packages import PREFIX, resolve_package
from aepo_fast.report.unexpected import first_line

_WIDTH = 40  # of a bar, in characters
_SIGNS = {
    "process": "p",
    "weights": "W",
    "optimizer": "O",
    "gradients": "G",
    "reference": "R",
    "sampler": "S",
    "gathered": "g",
    "activations": "a",
    "head": "h",
    "cache": "c",
    "holes": ".",
}


def plan_text(
    config: str,
    overrides: list[str],
    *,
    gpu: str | None = None,
    devices: int = 1,
    prompt_tokens: int | None = None,
    measure: bool = False,
    as_json: bool = False,
) -> str:
    """The report of `aepo-fast plan`, or its figures as JSON.

    gpu: a card by its size, such as "24GiB"; None is this machine. devices: how many processes
    train, on a device each; the report is for the one that needs the most. prompt_tokens: of the
    longest prompt; None is rollout.max_prompt_tokens. measure: really load the model and run a
    step.

    Raises ConfigError for a configuration, a model or a size that cannot be planned.
    """
    cfg = load_config(config, overrides)
    if measure and gpu is not None:
        reason = "a card that is only named cannot be measured"
        raise ConfigError("--measure", True, reason, "Leave out --gpu, or --measure")
    if measure and devices > 1:
        reason = f"{devices} processes are not started here"
        fix = "Train with torchrun: each step logs perf/peak_memory_gib beside the predicted one"
        raise ConfigError("--measure", True, reason, fix)
    check_lora(cfg.model.lora)
    for_gpu = gpu is not None or resolve_machine(cfg, trains=False).is_gpu
    settings = read_settings(cfg.model)
    import_packages(cfg)
    if gpu is not None:
        device = named_device(gpu)
    else:
        device = this_device(is_gpu=for_gpu, sharing=devices)

    def over(devices: int) -> Planner:
        known = {"prompt_tokens": prompt_tokens, "for_gpu": for_gpu}
        return planner(settings, device, **known, devices=devices)

    plan = over(devices)
    found = plan(cfg)
    largest = largest_settings(cfg, plan) if found.fits else {}
    changes: list[Change] = []
    if not found.fits:
        several = devices > 1 and for_gpu
        changes = changes_over(cfg, over, devices) if several else cheapest_changes(cfg, plan)
    measured = measured_bytes(cfg) if measure else None
    if as_json:
        record = {"devices": devices, **_record(found, largest, changes, measured)}
        return json.dumps(record, indent=1)
    where = f"a GPU of {gib(device.memory)}" if for_gpu else "this machine's memory"
    if devices > 1:
        where = f"one of {devices} devices, each {where}" if for_gpu else f"a part of {where}"
    machine = machine_on(torch.device("cuda" if for_gpu else "cpu"), cfg)
    lines = [f"{cfg.model.path}: {_billions(found.num_weights)} weights, "]
    lines[0] += f"{_billions(found.num_trained)} of them trained, on {where}"
    lines += [machine.describe(), *_table(found), "", *_verdict(found)]
    lines += _largest(found, largest) + _changes(changes, found)
    if measured is not None:
        lines.append(f"measured: {gib(measured)}, predicted: {gib(found.peak)}")
    return "\n".join(lines)


def read_settings(cfg: ModelConfig) -> PretrainedConfig:
    """The settings of a model, without its weights.

    Raises ConfigError for a model that does not exist or that transformers does not know.
    """
    path, trusts = cfg.path, cfg.trust_remote_code
    if cfg.revision:
        check_model(path, cfg.revision)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            reason = "the folder has no config.json"
            raise ConfigError("model.path", path, reason, "Name a folder in Hugging Face format")
        return read_config(folder, trust_code=trusts)
    found = check_model(path, cfg.revision)
    if str(found).startswith(PREFIX):
        return read_config(resolve_package(str(found)))
    try:
        revision = cfg.revision or None
        if trusts:
            snapshot_download(str(found), revision=revision, allow_patterns=["*.py"])
        file = hf_hub_download(str(found), "config.json", revision=revision)
        return read_config(Path(file).parent, trust_code=trusts)
    except ConfigError:
        raise
    except Exception as error:  # no connection, no such model
        reason = (
            f"is no local folder, and the hub did not give its config.json: {first_line(error)}"
        )
        fix = "Check the path or id and the connection, or name a folder with a config.json"
        raise ConfigError("model.path", path, reason.rstrip("."), fix) from error


def measured_bytes(cfg: Config) -> int:
    """The peak of one step of a configuration's run, whose folder is a new temporary one."""
    import dataclasses
    import tempfile

    from aepo_fast.training.run import train
    from aepo_fast.training.step_metrics import peak_memory_gib

    with tempfile.TemporaryDirectory() as folder:
        trainer = dataclasses.replace(cfg.trainer, steps=2, warmup_steps=0, check_memory=False)
        cfg = dataclasses.replace(cfg, trainer=trainer, output_dir=folder)
        train(cfg, overwrite=True)
    return round(peak_memory_gib() * 2**30)


def _table(plan: MemoryPlan) -> list[str]:
    names = [name for name in _SIGNS if any(name in phase.parts for phase in plan.phases)]
    heads = ["phase", *names, "in all"]
    rows = [
        [phase.name, *(_number(phase.parts.get(name)) for name in names), _number(phase.total)]
        for phase in plan.phases
    ]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = ["", "GiB by phase of a step:"]
    for row in [heads, *rows]:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.append("")
    most = max(plan.device.memory if plan.device.memory < 2**50 else 0, plan.peak)
    for phase in plan.phases:
        lines.append(f"{phase.name.ljust(widths[0])} |{_bar(phase.parts, most)}|")
    legend = ", ".join(f"{_SIGNS[name]} {name}" for name in names)
    return [*lines, f"{' ' * widths[0]}  {legend}; a full bar is {gib(most)}"]


def _bar(parts: dict[str, int], most: int) -> str:
    bar, done = "", 0
    for name, size in parts.items():
        done += size
        bar += _SIGNS[name] * (round(_WIDTH * done / most) - len(bar))
    return bar.ljust(_WIDTH)


def _verdict(plan: MemoryPlan) -> list[str]:
    shape, found, device = plan.shape, plan.activations, plan.device
    verdict = "fits" if plan.fits else "does not fit"
    beside = "" if device.counted else f", {gib(plan.needed - plan.peak)} of it beside tensors"
    lengths = f"prompts of {shape.prompt_tokens} and completions of {shape.new_tokens} tokens"
    lines = round(found.lines)
    batch = f"{lines} {'line' if lines == 1 else 'lines'} of {round(found.width)} tokens"
    return [
        f"It {verdict}: {gib(plan.needed)} at its peak, in the phase {plan.worst.name!r}{beside}; "
        f"there are {gib(device.memory)}.",
        f"For {lengths}; a micro-batch has {batch}.",
    ]


def _largest(plan: MemoryPlan, largest: dict[str, int | None]) -> list[str]:
    if not largest:
        return []
    lines = ["", "The largest that fit, each alone:"]
    lines += [f"  {key} = {value}" for key, value in largest.items() if value is not None]
    model = largest_model(plan, plan.num_weights)
    return [*lines, f"  a model of about {_billions(model)} weights"]


def _changes(changes: list[Change], plan: MemoryPlan) -> list[str]:
    if plan.fits:
        return []
    if not changes:
        return ["", "No change of a few settings makes it fit: use a smaller model."]
    lines = ["", "Cheapest changes that make it fit:"]
    for number, change in enumerate(changes, start=1):
        settings = " ".join(f"--set {one}" for one in change.settings)
        settings = settings or f"--devices {change.devices}"
        lines.append(f"  {number}. {settings}   ({gib(change.plan.needed)})")
    return lines


def _record(
    plan: MemoryPlan, largest: dict[str, int | None], changes: list[Change], measured: int | None
) -> dict[str, Any]:
    return {
        "fits": plan.fits,
        "needed_bytes": plan.needed,
        "peak_bytes": plan.peak,
        "worst_phase": plan.worst.name,
        "device_bytes": plan.device.memory,
        "phases": {phase.name: phase.parts for phase in plan.phases},
        "shape": asdict(plan.shape),
        "largest": largest,
        "changes": [
            {
                "settings": list(one.settings),
                **({} if one.devices is None else {"devices": one.devices}),
                "needed_bytes": one.plan.needed,
            }
            for one in changes
        ],
        "measured_bytes": measured,
    }


def _number(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e8 else f"{count / 1e6:.1f}M"
