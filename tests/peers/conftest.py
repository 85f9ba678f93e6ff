"""Peers without their dependencies: bare packages in the place of their `__init__` files."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest


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
