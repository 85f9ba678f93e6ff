"""Every Triton kernel, ahead of time for every chip: it compiles, fits and does not spill."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.triton.compiled import SHARED_LIMIT, failure_of

pytest.importorskip("triton", reason="needs triton")


@pytest.mark.parametrize("chip", list(SHARED_LIMIT))
def test_every_kernel_compiles_without_spills(chip: int) -> None:
    # In a process of its own: in this one kernels are interpreted.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "compiled", "--check", "--chips", str(chip)],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none spills" in done.stdout and f" {chip} bf16" in done.stdout


GOOD: dict[str, Any] = {
    "kernel": "fused_partials",
    "chip": 90,
    "variant": "plain",
    "dtype": "bf16",
    "stack": 0,
    "local": 0,
    "shared": 98304,
    "instruction": "wgmma",
    "multiplies": True,
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stack": 8}, "spills: 8 bytes of stack"),
        ({"local": 16}, "16 of local memory"),
        ({"shared": 232_449}, "232449 bytes of shared memory"),
        ({"instruction": "mma.sync"}, "has no wgmma"),
    ],
)
def test_each_gate_fails_on_its_own(change: dict[str, Any], reason: str) -> None:
    assert failure_of(GOOD) is None
    assert reason in (failure_of(GOOD | change) or "")


def test_a_known_spill_is_put_up_with_and_no_larger_one() -> None:
    known = {"fused_partials bf16 plain on sm_90": 8}
    assert failure_of(GOOD | {"stack": 8}, known) is None
    assert failure_of(GOOD | {"stack": 16}, known) is not None
    assert failure_of(GOOD | {"stack": 8, "variant": "all"}, known) is not None
