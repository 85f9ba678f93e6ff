"""Large tensors that come back without page faults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")


def printed(probe: str, **variables: str) -> list[str]:
    """What a program prints where no variable but these says how malloc works."""
    named = ("MALLOC_", "THP_")
    found = {name: value for name, value in os.environ.items() if not name.startswith(named)}
    command = [sys.executable, "-c", probe]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=found | variables
    )
    return done.stdout.split()


PROBE = """
import resource, torch
from aepo_fast.training.malloc import keep_freed_memory
done = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(done, *[faults() for _ in range(40)])
"""


@pytest.mark.parametrize("asked", [True, False])
def test_freed_memory_is_used_again(asked: bool) -> None:
    # With a variable, malloc is left as the user set it.
    done, *faults = printed(PROBE, **({} if asked else {"MALLOC_ARENA_MAX": "4"}))
    assert done == str(asked)
    # Small blocks between two large ones keep the first few apart, so the heap grows at first.
    assert (max(map(int, faults[-10:])) < 1000) == asked, faults


GIVING = """
import torch
from aepo_fast.memory.devices import resident_bytes
from aepo_fast.training.malloc import return_freed_memory
done = return_freed_memory()
before = resident_bytes()
large = [torch.ones(2**20) for _ in range(32)]
between = [torch.ones(1) for _ in range(32)]
del large[1:]
print(done, resident_bytes() - before)
"""


def test_freed_memory_is_given_back() -> None:
    done, grown = printed(GIVING)
    assert done == "True" and int(grown) < 2**25  # of 128 MiB


HOLES = """
import torch
from aepo_fast.memory.devices import resident_bytes
from aepo_fast.training.malloc import return_freed_memory, return_holes
return_freed_memory()
before = resident_bytes()
blocks = [torch.ones(2**16) for _ in range(256)]
del blocks[:-1]  # the last keeps the heap from shrinking
held = resident_bytes() - before
return_holes()
print(held, resident_bytes() - before)
"""


def test_holes_are_given_back() -> None:
    held, kept = map(int, printed(HOLES))
    assert held > 2**25 and kept < 2**23  # of 64 MiB
