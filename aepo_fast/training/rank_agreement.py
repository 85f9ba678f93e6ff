"""Processes of one run must be alike: what differs is refused before any model loads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aepo_fast import __version__
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import Config
from aepo_fast.rollout.load import installed_version
from aepo_fast.samples import Prompt
from aepo_fast.training.assemble import Inputs
from aepo_fast.training.run_lock import LOCK_NAME
from aepo_fast.world import World

_PACKAGES = ("torch", "transformers")
_APPEARS_S = 60.0  # a new file on another machine; NFS remembers for so long that there was none


def check_same_settings(cfg: Config, machine: Machine) -> None:
    """Raise ConfigError, on all ranks, for a setting or a version that is not the same on all.

    Settings first, in their order, then what they mean on each machine.
    """
    if machine.world.size == 1:
        return
    found = dict(_settings(dataclasses.asdict(cfg)))
    found["trainer.device (resolved)"] = machine.device.type
    found["model.head_backend (resolved)"] = machine.head_backend
    for name in ("weights_dtype", "compute_dtype", "rollout_dtype"):
        found[f"{name} (resolved)"] = str(getattr(machine, name))
    found["version of aepo_fast"] = __version__
    for name in _PACKAGES:
        found[f"version of {name}"] = installed_version(name)
    fix = "Start all ranks with the same configuration and the same environment"
    _check_same(machine.world, found, fix)


def check_same_inputs(inputs: Inputs, folder: Path, world: World) -> None:
    """Raise ConfigError, on all ranks, where they have other data, or no folder in common.

    folder: of the run, which rank 0 holds.
    """
    if world.size == 1:
        return
    model = Path(inputs.model_folder)
    found: dict[str, object] = {
        "output_dir (can be seen)": _appears(folder / LOCK_NAME),
        "checkpoint to go on from": inputs.checkpoint and inputs.checkpoint.name,
        "data (prompts to train with)": _digest(inputs.prompts.train),
        "data (prompts held out)": _digest(inputs.prompts.heldout),
    }
    for path in sorted([*model.glob("*.json"), *model.glob("*.safetensors")]):
        found[f"model.path ({path.name}, bytes)"] = path.stat().st_size
    fix = "All ranks need one output_dir that they share, the same files and the same data"
    _check_same(world, found, fix)


def _check_same(world: World, own: dict[str, object], fix: str) -> None:
    everyone = world.gather(own)
    for key in dict.fromkeys(key for found in everyone for key in found):
        ranks: dict[str, list[int]] = {}
        for rank, found in enumerate(everyone):
            ranks.setdefault(repr(found.get(key)), []).append(rank)
        if len(ranks) > 1:
            parts = [f"{in_words(numbers)}: {value[:200]}" for value, numbers in ranks.items()]
            reason = f"is not the same on all ranks ({'; '.join(parts)})"
            raise ConfigError(key, everyone[0].get(key), reason, fix)


def _settings(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Settings and their values, by their names in the file."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _digest(prompts: Sequence[Prompt]) -> str:
    found = hashlib.sha256()
    for one in prompts:
        known = one.token_ids, one.key, one.source, one.columns
        found.update(json.dumps(known, sort_keys=True, default=lambda _: None).encode())
    return f"{len(prompts)} prompts, {found.hexdigest()[:12]}"


def _appears(path: Path) -> bool:
    until = time.monotonic() + _APPEARS_S
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def in_words(ranks: list[int]) -> str:
    """Some ranks in words: "rank 3", "ranks 0, 1", or of many the first ones and how many more."""
    shown = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"
