"""Memory that nobody wrote holds NaN, so that an output left out shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    # In this mode torch.empty fills what it gives. It only warns of the oracle's own operations.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
