"""What is wrong with a checkpoint that was damaged after it was written, before a model loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from aepo_fast.config.errors import ConfigError
from aepo_fast.report.unexpected import first_line
from aepo_fast.training.checkpoint import STATE_NAME, complete_checkpoints
from aepo_fast.training.optimizer_state import FOLDER_NAME, OPTIMIZER_NAME


def damage(checkpoint: Path) -> str | None:
    """The file of a checkpoint that cannot be read, and why; None for a whole one.

    Of tensors only their presence and sizes are looked at, so this takes no time or memory.
    """
    of_ranks = list(checkpoint.glob(f"{FOLDER_NAME}/*"))
    expected = {"config.json", FOLDER_NAME if of_ranks else OPTIMIZER_NAME, STATE_NAME}
    path = checkpoint
    try:
        found = {path.name: path for path in sorted([*checkpoint.iterdir(), *of_ranks])}
        for path in found.values():
            if path.suffix == ".json":
                content = json.loads(path.read_bytes())
                if path.name.endswith(".safetensors.index.json"):
                    expected |= set(content["weight_map"].values())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix == ".pt":
                torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # whatever a reader of damaged bytes comes upon
        return f"{path.name}: {first_line(error).split('. ')[0] or type(error).__name__}"
    if not any(name.endswith(".safetensors") for name in found):
        expected.add("model.safetensors")
    missing = sorted(expected - set(found))
    return f"{missing[0]} is missing" if missing else None


def last_checkpoint(run: Path, argument: str, again: str) -> Path:
    """The last checkpoint of a run's folder, which was given as `argument`.

    Raises ConfigError where there is none, or a damaged one. again: what to do with an older one
    that is whole, with {} in its place.
    """
    found = complete_checkpoints(run / "checkpoints")
    if not found:
        reason = "has no complete checkpoint"
        raise ConfigError(argument, str(run), reason, "Train it first, or name a model")
    if reason := damage(found[-1]):
        older = newest_whole(found[:-1])
        fix = "No older one is whole" if older is None else again.format(older)
        raise ConfigError(argument, str(run), f"{found[-1]} is damaged: {reason}", fix)
    return found[-1]


def newest_whole(checkpoints: Sequence[Path]) -> Path | None:
    """The last of some checkpoints that is whole."""
    return next((path for path in reversed(checkpoints) if damage(path) is None), None)
