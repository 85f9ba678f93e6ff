"""What all kernel tests share: memory that nobody wrote holds NaN; the C++ instruction sets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from aepo_kernels import backends
from aepo_kernels.cpu import library as cpu_library


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    # In this mode torch.empty fills what it gives. It only warns of the oracle's own operations.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=cpu_library.instruction_sets() or ["none"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set of the C++ library in turn."""
    monkeypatch.setenv(cpu_library.ISA_VARIABLE, request.param)
    return request.param


@pytest.fixture(params=["rows", "columns", "upcast"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of a CPU's bfloat16 GEMMs and logits, whichever this machine would choose."""
    monkeypatch.setattr(backends, "_has_amx", lambda: request.param == "columns")
    monkeypatch.setattr(backends, "_cpu_multiplies_bfloat16", lambda: request.param != "upcast")
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
