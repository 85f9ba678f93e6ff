"""Linux is asked for huge pages within a tensor, never beyond it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from aepo_kernels.cpu.huge_pages import advise

PAGE = 2**21


def advised() -> list[range]:
    """Addresses of this process for which huge pages are wanted."""
    text = Path("/proc/self/smaps").read_text()
    found, addresses = [], range(0)
    for line in text.splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            addresses = range(int(match[1], 16), int(match[2], 16))
        elif line.startswith("VmFlags:") and " hg" in line:
            found.append(addresses)
    return found


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()
    or not Path("/proc/self/smaps").exists(),
    reason="only Linux has them and tells",
)
def test_whole_pages_within_a_tensor() -> None:
    tensor = torch.empty(40 * PAGE + 5, dtype=torch.uint8)
    assert advise(tensor) is tensor
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    inside = [pages for pages in advised() if pages.start < stop and pages.stop > start]
    assert sum(map(len, inside)) >= 39 * PAGE
    assert all(start <= pages.start and pages.stop <= stop for pages in inside)


def test_none_in_the_heap() -> None:
    # malloc's own blocks would take whole huge pages there.
    before = advised()
    kept = [advise(torch.empty(size, dtype=torch.uint8)) for size in (0, 1, PAGE + 1, 16 * PAGE)]
    assert advised() == before and len(kept) == 4
