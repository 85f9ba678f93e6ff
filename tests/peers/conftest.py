"""Peers without their dependencies: bare packages in the place of their `__init__` files."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

VERL = (
    "verl",
    "verl.utils",
    "verl.utils.experimental",
    "verl.utils.kernel",
    "verl.models",
    "verl.models.transformers",
)


@pytest.fixture
def bare_packages() -> Iterator[Callable[..., None]]:
    """Puts packages of a peer without their __init__ into sys.modules, and takes all out again.

    An `__init__` of the whole trainer imports what the one function does not use (ray, deepspeed).
    """
    roots: set[str] = set()

    def put(*names: str) -> None:
        root = names[0].split(".")[0]
        spec = importlib.util.find_spec(root)
        if spec is None or not spec.submodule_search_locations:
            pytest.skip(f"{root} is not installed")
        base = spec.submodule_search_locations[0]
        roots.add(root)
        for name in names:
            module = ModuleType(name)
            module.__path__ = ["/".join([base, *name.split(".")[1:]])]
            sys.modules[name] = module

    yield put
    for name in list(sys.modules):
        if name.split(".")[0] in roots:
            del sys.modules[name]


def module(name: str, **members: Any) -> ModuleType:
    """A module of a few members."""
    made = ModuleType(name)
    vars(made).update(members)
    return made


def index_first_axis(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return values[indices]


def unpad_input(values: torch.Tensor, mask: torch.Tensor) -> tuple[Any, ...]:
    indices = mask.flatten().nonzero()[:, 0]
    return values.flatten(0, 1)[indices], indices, mask.sum(1).cumsum(0), None, None


def pad_input(values: torch.Tensor, indices: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    whole = values.new_zeros(rows * width, *values.shape[1:]).index_copy(0, indices, values)
    return whole.unflatten(0, (rows, width))


def rearrange(values: torch.Tensor, pattern: str) -> torch.Tensor:
    return values.flatten(0, 1)


@pytest.fixture
def actor_class(bare_packages: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Any:
    """OpenRLHF's Actor, with stand-ins for what it imports of flash-attn and DeepSpeed."""
    padding = {
        "index_first_axis": index_first_axis,
        "pad_input": pad_input,
        "rearrange": rearrange,
        "unpad_input": unpad_input,
    }
    for made in (
        module("flash_attn"),
        module("flash_attn.bert_padding", **padding),
        module("flash_attn.utils"),
        module("flash_attn.utils.distributed", all_gather=None),
        module("deepspeed"),
    ):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    bare_packages("openrlhf", "openrlhf.models")
    from openrlhf.models.actor import Actor

    return Actor


@pytest.fixture
def verl_packages(bare_packages: Callable[..., None]) -> None:
    """verl as far as its heads and its models' forwards need it."""
    bare_packages(*VERL)
