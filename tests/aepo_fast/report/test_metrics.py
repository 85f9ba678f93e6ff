"""What a run writes: metrics.jsonl, the terminal's line, progress and TensorBoard."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from aepo_fast.config.errors import ConfigError
from aepo_fast.report.logger import MetricsLogger, check_tensorboard, read_lines
from bench.common.environment import RESULTS, ROOT
from tests.tiny_run import explained_metrics

STEP = {
    "step": 3,
    "reward": 0.25,
    "entropy": 1.2345,
    "aepo/entropy_target": 0.5,
    "aepo/temperature": 0.8,
    "completions/clipped_ratio": 0.43,
    "skipped_updates": 0,
    "time/step": 2.0,
}


def logger(folder: Path, *, tensorboard: bool = False) -> MetricsLogger:
    return MetricsLogger(folder, tensorboard=tensorboard, total_steps=10)


def test_a_step_is_one_json_line_and_one_plain_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger(tmp_path).log(STEP)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == STEP
    expected = "step  3/10  reward 0.250  H 1.234  H0 0.50  T 0.80  cut 43%  s 2.0\n"
    assert capsys.readouterr().out == expected


def test_skipped_updates_are_shown_only_when_there_are_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger(tmp_path).log({**STEP, "skipped_updates": 2})
    assert "skipped 2" in capsys.readouterr().out


def test_numbers_that_are_not_finite_become_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger(tmp_path).log({"step": 1, "reward": float("nan"), "loss": float("inf"), "entropy": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "reward": None, "loss": None, "entropy": 0.5}
    assert capsys.readouterr().out == "step  1/10  H 0.500\n"


def test_a_resumed_run_drops_later_steps_and_a_killed_runs_half_line(tmp_path: Path) -> None:
    one = logger(tmp_path)
    for step in range(4):
        one.log({"step": step, "reward": 1 / 3 + step})
    with one.path.open("a") as file:
        file.write('{"step": 4, "rew')
    logger(tmp_path).truncate_after(2)
    assert read_lines(one.path) == [{"step": s, "reward": 1 / 3 + s} for s in range(3)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncating_before_the_first_line_is_nothing(tmp_path: Path) -> None:
    logger(tmp_path).truncate_after(0)
    assert not list(tmp_path.iterdir())


def test_progress_is_silent_in_a_log_and_counts_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = logger(tmp_path)
    with one.progress("step 1") as advance:
        advance(5)
    assert capsys.readouterr().out == ""
    screen = io.StringIO()
    one.console = Console(file=screen, force_terminal=True, width=100)
    with one.progress("step 1") as advance:
        advance(5)
        advance(7)
    assert "step 1" in screen.getvalue() and "12 tokens" in screen.getvalue()


def test_tensorboard_gets_the_numbers_once_across_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = logger(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        first.log({"step": step, "reward": float(step), "loss": float("nan")})
    first.close()
    resumed = logger(tmp_path, tensorboard=True)
    resumed.truncate_after(1)
    resumed.log({"step": 2, "reward": 20.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward"]
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 1.0), (2, 20)]


def test_tensorboard_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"logging.tensorboard = True: .*aepo-fast\[tensorboard"):
        check_tensorboard()


def test_the_glossary_explains_all_metrics_and_no_others() -> None:
    runs = RESULTS.glob("*/first-light*.jsonl")
    logged = {name for path in runs for line in read_lines(path) for name in line}
    assert len(logged) > 50
    assert logged - {"step"} <= explained_metrics()
    source = "".join(path.read_text() for path in (ROOT / "aepo_fast").rglob("*.py"))
    assert all(f'"{name}"' in source for name in explained_metrics() - logged)
