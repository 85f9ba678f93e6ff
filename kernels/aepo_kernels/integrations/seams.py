"""Puts a function of ours in the place of a peer's, after a look at its version and signature."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from aepo_kernels.versions import leading_numbers

_originals: dict[tuple[str, str], tuple[Any, str, Any]] = {}


def import_peer(module: str, how: str) -> Any:
    """A module of a peer; raises ImportError that names it and says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported ({error}); {how}") from error


def check_version(distribution: str, oldest: str) -> str:
    """The installed version of a peer; raises ImportError where it is older than `oldest`."""
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError as error:
        how = f"pip install '{distribution}>={oldest}'"
        raise ImportError(f"{distribution} is not installed; {how}") from error
    if leading_numbers(found) < leading_numbers(oldest):
        reason = f"is older than {oldest}, the first with the function that is replaced"
        raise ImportError(f"{distribution} {found} {reason}; pip install -U {distribution}")
    return found


def installed_version(distribution: str) -> str:
    """The version of a peer that is installed from its repository, or "from source"."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "from source"


def check_parameters(function: Callable[..., Any], names: Sequence[str], where: str) -> None:
    """Raise ImportError unless a function's parameters are these, in this order."""
    found = list(inspect.signature(function).parameters)
    if found != list(names):
        reason = f"takes ({', '.join(found)}) and not ({', '.join(names)})"
        fix = "this version of the peer is not known; use head_arguments and linear_logprob"
        raise ImportError(f"{where} {reason}; {fix}")


def check_first_parameters(function: Callable[..., Any], names: Sequence[str], where: str) -> None:
    """As `check_parameters`, but more parameters with defaults may follow."""
    parameters = list(inspect.signature(function).parameters.values())
    more = parameters[len(names) :]
    if [p.name for p in parameters[: len(names)]] != list(names) or any(
        p.default is p.empty for p in more
    ):
        check_parameters(function, names, where)


def modules_with(prefix: str, name: str, value: Any) -> list[Any]:
    """A peer's modules that hold a function under its name, whoever imported it from where."""
    found = [module for key, module in list(sys.modules.items()) if key.startswith(prefix)]
    return [module for module in found if vars(module).get(name) is value]


def replace(owner: Any, name: str, value: Any, peer: str) -> str:
    """Set an attribute of a peer's module or class, and remember the one before for `restore`.

    Returns "where -> aepo_kernels". A second call changes nothing.
    """
    path = owner.__name__
    if not inspect.ismodule(owner):
        path = f"{owner.__module__}.{owner.__qualname__}"
    where = f"{path}.{name}"
    if (peer, where) not in _originals:
        _originals[peer, where] = owner, name, getattr(owner, name)
        setattr(owner, name, value)
    return f"{where} -> aepo_kernels"


def restore(peer: str) -> None:
    """Put everything of a peer that `replace` changed back; nothing where nothing was changed."""
    for key in [key for key in _originals if key[0] == peer]:
        owner, name, original = _originals.pop(key)
        setattr(owner, name, original)


def refuse_zero3(weight: Any) -> None:
    """Raise ValueError for a head's weight that DeepSpeed ZeRO-3 takes away after its use."""
    if hasattr(weight, "ds_id"):
        raise ValueError(
            "the head's weight is partitioned by DeepSpeed ZeRO-3, and is gone when its gradient "
            "is computed; use ZeRO-2 or FSDP2"
        )
