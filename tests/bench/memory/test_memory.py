"""The benchmark of plans: its runs, its table, and its plans without a run."""

from __future__ import annotations

import pytest

from aepo_fast.config.toml import load_config
from bench.__main__ import main
from bench.memory import run
from bench.memory.cases import ON_CPU, ON_GPU, OVER_RANKS, SHAPES, runs


def test_swapped_runs_are_the_same_settings_on_the_other_model() -> None:
    first, second = runs(on_gpu=False), runs(on_gpu=False, swap=True)
    assert [case for _, case in first] == [case for _, case in second] == list(ON_CPU)
    assert all(one != other for (one, _), (other, _) in zip(first, second, strict=True))
    over_ranks = runs(on_gpu=False, ranks=2)
    assert [case for _, case in over_ranks] == list(OVER_RANKS)
    assert {name for name, _ in first + over_ranks + runs(on_gpu=True)} == set(SHAPES)


@pytest.mark.parametrize("case", [*ON_CPU, *ON_GPU, *OVER_RANKS])
def test_settings_of_a_run_go_together(case: tuple[str, ...]) -> None:
    load_config("first-light", list(case))


def test_a_failed_run_says_why_in_its_row() -> None:
    measured = {"predicted_gib": 2.0, "measured_gib": 2.5, "ratio": 0.8}
    one = {"model": "a", "settings": ["trainer.lr=1"], "status": "ok", **measured}
    failed = {"model": "b", "settings": [], "status": "failed", "message": "killed"}
    rows = run.table([one, failed]).splitlines()
    assert rows[2:] == ["| a | lr 1 | 2.00 | 2.50 | 0.800 |", "| b |  | - | - | killed |"]


def test_a_dry_run_plans_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned: list[list[str]] = []
    monkeypatch.setattr(run, "_config", lambda folder, name, on_gpu: folder / "run.toml")
    monkeypatch.setattr(run, "_planned", lambda config, case, **how: planned.append(case) or "")
    arguments = ["bench", "memory", "--dry-run", "--only", "muon", "--only", "lora"]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    assert len(planned) == 1 and "result:" not in capsys.readouterr().out
