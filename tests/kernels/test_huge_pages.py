"""Memory for large results on a CPU."""

from __future__ import annotations

import mmap

import pytest
import torch

from aepo_kernels import huge_pages


@pytest.mark.parametrize(("count", "advised"), [(1000, False), (2**22 + 5, True)])
def test_large_memory_alone_is_advised_and_only_its_own_pages(
    count: int, advised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *a: calls.append(a) or 0)
    tensor = huge_pages.empty((count,), torch.bfloat16, torch.device("cpu"))
    assert tensor.shape == (count,) and tensor.dtype == torch.bfloat16
    assert len(calls) == advised
    for start, size, _ in calls:
        assert start % mmap.PAGESIZE == 0 and start >= tensor.data_ptr()
        assert start + size == tensor.data_ptr() + tensor.nbytes


def test_systems_without_advice_get_memory_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    tensor = huge_pages.empty((2**22,), torch.float32, torch.device("cpu")).fill_(3)
    assert tensor.sum() == 3 * 2**22
