"""Writes the weights of a model in shards, so that no process holds all of them at once."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from aepo_fast.model.lora import has_adapter
from aepo_fast.model.sharded import is_sharded, whole_on_first
from aepo_fast.world import World

LARGEST = 5 * 10**9  # bytes of a file, of a single weight more


def writes_by_files(model: PreTrainedModel, world: World) -> bool:
    """Whether `write_weights` is for a model: not for adapters, which are small.

    Nor for weights that files name otherwise than the model: transformers needs all of them at
    once to give them back their names.
    """
    renamed = getattr(model, "_weight_conversions", None)
    return world.size > 1 and is_sharded(model) and not has_adapter(model) and not renamed


def write_weights(
    model: PreTrainedModel, folder: Path, world: World, *, largest: int = LARGEST
) -> None:
    """Write weights and settings as `save_pretrained` would; all ranks call this.

    Weights are gathered one after the other; the first rank keeps those of a file, of `largest`
    bytes at most, until it is written. Raises OSError or SafetensorError on all ranks where it
    cannot be written.
    """
    from safetensors.torch import save_file

    files = _files_of(model, largest)
    place: dict[str, str] = {}
    size = 0
    for number, weights in enumerate(files, start=1):
        suffix = f"-{number:05}-of-{len(files):05}" if len(files) > 1 else ""
        name = SAFE_WEIGHTS_NAME.replace(".", f"{suffix}.")
        held: dict[str, Tensor] = {}
        for key, weight in weights.items():
            gathered = whole_on_first(weight, world).detach()
            if world.is_first:
                held[key] = gathered.cpu().contiguous()
            del gathered
            place[key] = name
            size += weight.numel() * weight.element_size()
        world.on_first(partial(save_file, held, folder / name, metadata={"format": "pt"}))

    def finish() -> None:
        if len(files) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": place}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text)
        config: Any = model.config
        config.dtype = str(model.dtype).removeprefix("torch.")
        config.architectures = [type(model).__name__.removeprefix("FSDP")]
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)

    world.on_first(finish)


def _files_of(model: PreTrainedModel, largest: int) -> list[dict[str, Tensor]]:
    """The weights of each file by their names, each tied weight once."""
    files: list[dict[str, Tensor]] = [{}]
    seen: set[int] = set()
    size = 0
    ignored = set(model._keys_to_ignore_on_save or ())
    for name, weight in model.state_dict(keep_vars=True).items():
        if id(weight) in seen or name in ignored:
            continue
        seen.add(id(weight))
        own = weight.numel() * weight.element_size()
        if files[-1] and size + own > largest:
            files.append({})
            size = 0
        files[-1][name] = weight
        size += own
    return files
