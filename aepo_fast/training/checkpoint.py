"""Checkpoints: written whole or not at all, with everything a run needs to go on.

A checkpoint is a folder step_N: the model in Hugging Face format, the state of the optimizer
(`optimizer.pt`, or the folder `optimizer` of several processes), and `state.pt` with the state of
every other part. It is written under a temporary name, flushed to disk and then
renamed, so a folder named step_N is always complete.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aepo_fast.config.errors import ConfigError
from aepo_fast.model.folder import same_model
from aepo_fast.model.lora import adapter_state, has_adapter, save_adapter
from aepo_fast.model.sharded import is_sharded, whole_on_first
from aepo_fast.training.optimizer_state import save_optimizer
from aepo_fast.training.write_weights import write_weights, writes_by_files
from aepo_fast.world import ALONE, World

_COMPLETE = re.compile(r"step_(\d+)")
STATE_NAME = "state.pt"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; older checkpoints are untouched."""


def rng_state(*, with_gpu: bool) -> dict[str, Any]:
    """The state of Python's, numpy's and torch's global random streams, of GPUs only on request."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.array(keys)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if with_gpu:
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any] | list[dict[str, Any]], *, rank: int = 0) -> None:
    """Put back what `rng_state` returned, or of a list that of a rank.

    Ranks that there were not take those of others.
    """
    if isinstance(state, list):
        state = state[rank % len(state)]
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy(), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    # A run may go on where there are fewer GPUs, or none.
    for device, one in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(one, device)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("step_*")
        if (match := _COMPLETE.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    world: World = ALONE,
    best: int | None = None,
) -> Path:
    """Write step_N under `folder`, then delete all but the newest `keep` and that of step `best`.

    world: all its processes call this; they have the folder in common, and each writes its part of
    the optimizer. Raises CheckpointError if the disk is full or refuses; what stood there before
    still does.
    """
    final = folder / f"step_{step}"
    partial = folder / f"step_{step}.tmp"
    streams = world.gather(state["rng"])
    state = state if world.size == 1 else {**state, "rng": streams}

    def begin() -> None:
        for unfinished in folder.glob("step_*.tmp"):  # a killed run's
            shutil.rmtree(unfinished)
        partial.mkdir(parents=True)

    by_files = writes_by_files(model, world)

    def finish() -> None:
        if by_files:
            _save_tokenizer(tokenizer, partial)
        else:
            save_model(model, tokenizer, partial, weights)
        torch.save(state, partial / STATE_NAME)
        _flush(partial)
        if final.exists():  # a run that starts anew in an old folder
            shutil.rmtree(final)
        partial.rename(final)
        _sync(folder)  # before what stood there is deleted

    try:
        world.on_first(begin)
        if by_files:
            write_weights(model, partial, world)
        weights = None if by_files else whole_for_saving(model, world)
        save_optimizer(optimizer, partial, world)
        world.on_first(finish)
    except (OSError, SafetensorError, RuntimeError) as error:
        if world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(folder).free / 2**30 if folder.exists() else 0.0
        older = complete_checkpoints(folder)
        kept = f"the last complete one is {older[-1]}" if older else "there is no older one"
        raise CheckpointError(
            f"cannot write checkpoint {final}: {error} ({free:.2f} GiB free); {kept}. "
            "Free some space and go on with --resume, or lower checkpoint.keep"
        ) from error
    for old in complete_checkpoints(folder)[:-keep] if world.is_first else ():
        if old.name == f"step_{best}":
            continue
        try:
            shutil.rmtree(old)
        except OSError as error:
            print(f"cannot delete the old checkpoint {old}: {error}", file=sys.stderr)
    return final


def whole_for_saving(model: PreTrainedModel, world: World) -> dict[str, torch.Tensor] | None:
    """What `save_model` needs of a model in shards, on the first rank; None of another model."""
    if not is_sharded(model):
        return None
    state = adapter_state(model) if has_adapter(model) else model.state_dict(keep_vars=True)
    found: dict[int, torch.Tensor] = {}
    for tensor in state.values():  # a tied weight once
        if id(tensor) not in found:
            gathered = whole_on_first(tensor, world)
            found[id(tensor)] = gathered if world.is_first else tensor
    return {name: found[id(tensor)] for name, tensor in state.items()}


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a model, or its adapter and settings where it has one, and its tokenizer.

    weights: those of `whole_for_saving`, of a model in shards.
    """
    if has_adapter(model):
        save_adapter(model, folder, weights)
        model.config.save_pretrained(folder)
    else:
        kept: dict[str, Any] = {} if weights is None else {"state_dict": weights}
        model.save_pretrained(folder, **kept)
    _save_tokenizer(tokenizer, folder)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    _make_portable(folder)


def _make_portable(folder: Path) -> None:
    """Add to the saved files what readers other than transformers 5 look for."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # without it they assume 10000, without a word
        config.setdefault("rope_theta", rope["rope_theta"])
        path.write_text(json.dumps(config, indent=2) + "\n")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2) + "\n")


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The `state` given to `save_checkpoint`."""
    return torch.load(checkpoint / STATE_NAME, weights_only=True)


def check_same_optimizer(state: dict[str, Any], name: str, checkpoint: Path) -> None:
    """Refuse a checkpoint that has the state of another optimizer than `trainer.optimizer`."""
    saved = state.get("optimizer", "adamw")  # of older ones, which had no other
    if saved != name:
        reason = f"the checkpoint {checkpoint} has the state of {saved!r}"
        fix = "Resume with that optimizer, or choose another output_dir"
        raise ConfigError("trainer.optimizer", name, reason, fix)


def check_same_model(state: dict[str, Any], model_path: str, checkpoint: Path) -> None:
    """Refuse a checkpoint that was made from another model."""
    if not same_model(state["model_path"], model_path):
        raise ConfigError(
            "model.path",
            model_path,
            f"the checkpoint {checkpoint} was made from {state['model_path']!r}",
            "Resume with that model, or choose another output_dir",
        )
