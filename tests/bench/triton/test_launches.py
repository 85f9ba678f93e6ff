"""The sweep over launches, with Triton's interpreter in a GPU's place."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")
from aepo_kernels.gpu import launch
from aepo_kernels.gpu.launch import FusedLaunch, RowLaunch
from bench.triton import launches

SMALL = argparse.Namespace(tokens=3, vocab=70)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_every_launch_is_timed_and_the_tables_stay() -> None:
    before = dict(launch.STATS_LAUNCH)
    taken: list[int] = []

    def timer(call: Callable[[], object]) -> float:
        call()
        taken.append(launch.stats_launch(DEVICE).block)
        return 1000.0 / taken[-1]

    reads, grads = launches.row_calls(SMALL, DEVICE)
    rows = launches.sweep("STATS_LAUNCH", [RowLaunch(32, 1), RowLaunch(64, 1)], reads, timer)
    assert taken == [32, 32, 64, 64] and launch.STATS_LAUNCH == before
    assert [row["launch"]["block"] for row in rows] == [64, 32]  # the fastest first
    assert set(rows[0]) == {"launch", "ms", "second_ms"}
    (row,) = launches.sweep("GRAD_LAUNCH", [RowLaunch(32, 1)], grads, timer)
    assert set(row) == {"launch", "ms", "entropy_ms", "second_ms"}


def test_the_fused_forward_takes_what_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    calls = launches.fused_calls(SMALL, 16, DEVICE)
    candidates = [FusedLaunch(16, 32, 16, 1, 1, split=split) for split in (False, True)]
    bad = FusedLaunch(16, 30, 16, 1, 1)
    rows = launches.sweep("FUSED_LAUNCH", [bad, *candidates], calls, lambda call: call() and 1.0)
    assert "message" in rows[-1] and rows[-1]["launch"]["block_vocab"] == 30
    launches.report("fused", rows)
    assert "3 launches, 1 of them failed" in capsys.readouterr().out


def test_what_is_tried_is_what_a_thread_can_hold() -> None:
    for candidate in [*launches.stats_launches(), *launches.grad_launches()]:
        assert 8 <= candidate.block // (32 * candidate.num_warps) <= 32
    assert len(set(launches.fused_launches(DEVICE))) == 32


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees none"):
        launches.main(SMALL)
