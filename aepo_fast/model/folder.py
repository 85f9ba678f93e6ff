"""Whether a model's folder is whole, by its files alone: said before anything is loaded of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from aepo_fast.config.errors import ConfigError

_POINTER = b"version https://git-lfs"  # what Git LFS leaves in the place of a large file
_INDEX = ".index.json"
ADAPTER_CONFIG = "adapter_config.json"  # of peft
_AGAIN = "Fetch the file again"


@dataclass(frozen=True)
class _Refusal:
    """Raises ConfigError of a folder, for the `model.path` it was given as."""

    path: str

    def __call__(self, reason: str, fix: str) -> NoReturn:
        raise ConfigError("model.path", self.path, reason, fix)


def check_folder(folder: Path, path: str) -> None:
    """Raise ConfigError, for the `model.path` it was given as, where a file is missing or damaged.

    Read are all JSON files, and the headers of the weights.
    """

    refuse = _Refusal(path)
    files = sorted(one for one in folder.iterdir() if one.is_file())
    names = {one.name for one in files}
    if ADAPTER_CONFIG in names:
        reason = "the folder holds an adapter without the model that it was trained for"
        refuse(reason, "Name that model, or merge both: aepo-fast export RUN FOLDER --merge")
    weights = [name for name in names if name.endswith(".safetensors") or _is_bin(name)]
    if "config.json" not in names or not weights:
        reason = "the folder has no config.json with weights beside it"
        refuse(reason, "Name a folder in Hugging Face format")
    for file in files:
        try:
            with file.open("rb") as handle:
                is_pointer = handle.read(len(_POINTER)) == _POINTER
        except OSError as error:
            refuse(f"{file.name} cannot be read: {error.strerror}", "Check its permissions")
        if is_pointer:
            reason = f"{file.name} is a pointer of Git LFS, not the file itself"
            refuse(reason, "Run git lfs pull in the folder, or download the model again")
        if file.suffix == ".json":
            try:
                content = json.loads(file.read_text(encoding="utf-8-sig"))
            except (ValueError, RecursionError) as error:  # also of a wrong encoding
                refuse(f"{file.name} is not JSON: {error}", _AGAIN)
            if file.name == "config.json" and not isinstance(content, dict):
                refuse("config.json holds no settings", _AGAIN)
    _check_weights(folder, names, refuse)


def _is_bin(name: str) -> bool:
    return name.startswith("pytorch_model") and name.endswith(".bin")


def _check_weights(folder: Path, names: set[str], refuse: _Refusal) -> None:
    """Of the weights that transformers takes: whole, with all their parts and an index of them."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = whole + _INDEX
        if whole in names:
            if whole.endswith(".safetensors"):
                _tensors(folder / whole, refuse)
            return
        if index in names:
            _check_index(folder, names, index, refuse)
            return
    found = sorted(name for name in names if name.endswith((".safetensors", ".bin")))
    reason = f"it has {found[0]}, but neither model.safetensors nor model.safetensors{_INDEX}"
    refuse(reason, "Add the index that names the weights' files, or rename a single file")


def _check_index(folder: Path, names: set[str], index: str, refuse: _Refusal) -> None:
    content = json.loads((folder / index).read_text(encoding="utf-8-sig"))
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        refuse(f"{index} has no weight_map", _AGAIN)
    wanted = sorted(map(str, set(places.values())))
    if "metadata" not in content:  # transformers reads it
        refuse(f"{index} has no metadata", 'Add "metadata": {} to it')
    missing = [name for name in wanted if name not in names]
    if missing:
        reason = f"{missing[0]} is missing, one of {len(wanted)} files that {index} names"
        refuse(reason, "Add it, or download the model again")
    for name in wanted:
        if name.endswith(".safetensors"):
            there = _tensors(folder / name, refuse)
            lacking = sorted(key for key in places if places[key] == name and key not in there)
            if lacking:
                reason = f"{name} lacks {lacking[0]}, which {index} places there"
                refuse(reason, "Download both files again, of the same version")


def _tensors(file: Path, refuse: _Refusal) -> set[str]:
    """The names of the tensors of a safetensors file, if it is as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            refuse(f"{file.name} is cut off or no safetensors file: it has {size} bytes", _AGAIN)
        try:
            header = json.loads(handle.read(length))
            ends = list(_ends(header))
        except (ValueError, TypeError, LookupError, AttributeError):
            refuse(f"{file.name} is no safetensors file: its header is damaged", _AGAIN)
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        reason = f"{file.name} has {size} bytes where its header says {expected}: it is damaged"
        refuse(reason, _AGAIN)
    return set(header)


def _ends(header: dict[str, Any]) -> Iterator[int]:
    for name, tensor in header.items():
        if name != "__metadata__":
            yield int(tensor["data_offsets"][1])


def same_model(path: str, other: str) -> bool:
    """Whether two values of `model.path` name the same model, however a folder is spelled."""
    if path == other:
        return True
    one, two = (Path(name).expanduser() for name in (path, other))
    return one.exists() and two.exists() and one.samefile(two)
