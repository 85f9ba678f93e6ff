"""The picture of a run shows what the log says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.axes import Axes

from aepo_fast.plot import plot_run

EVAL = {"eval/avg@k": 0.5, "eval/ci95_low": 0.4, "eval/ci95_high": 0.6}


def step(number: int, **changes: Any) -> dict[str, Any]:
    values = {
        "step": number,
        "reward": number / 10,
        "entropy": 1.0 - number / 10,
        "aepo/entropy_target": 0.7,
        "aepo/temperature": 1.0,
        "completions/mean_length": 20.0 + number,
        "completions/clipped_ratio": 0.1,
    }
    return {**values, **changes}


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Plot a log and return the axes: reward, entropy, temperature, length, share cut off."""

    def drawn(lines: list[dict[str, Any]], tail: str = "") -> list[Axes]:
        text = "".join(json.dumps(line) + "\n" for line in lines) + tail
        (tmp_path / "metrics.jsonl").write_text(text)
        monkeypatch.setattr(plt, "close", lambda figure: None)
        path = plot_run(tmp_path)
        assert path == tmp_path / "plot.png" and path.read_bytes().startswith(b"\x89PNG")
        return plt.gcf().axes

    yield drawn
    monkeypatch.undo()
    plt.close("all")


def points(axis: Axes, line: int = 0) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in axis.get_lines()[line].get_xydata()]


def test_series_hold_the_logged_numbers(draw: Any) -> None:
    log = [{"step": 0, **EVAL}, step(1), step(2, reward=None), step(3, **EVAL)]
    reward, entropy, temperature, length, cut = draw(log)
    assert points(reward) == [(1, 0.1), (3, 0.3)]
    assert points(reward, 1) == [(0, 0.5), (3, 0.5)]
    (intervals,) = reward.collections
    assert [segment[:, 1].tolist() for segment in intervals.get_segments()] == [[0.4, 0.6]] * 2
    assert points(entropy) == [(1, 0.9), (2, 0.8), (3, 0.7)]
    assert points(temperature) == [(1, 1.0), (2, 1.0), (3, 1.0)]
    assert points(length) == [(1, 21.0), (2, 22.0), (3, 23.0)]
    assert points(cut) == [(1, 0.1), (2, 0.1), (3, 0.1)]


def test_the_target_is_drawn_only_where_aepo_is_at_work(draw: Any) -> None:
    falling = {"aepo/temperature": 1.2, "aepo/entropy_target": 0.6}
    entropy = draw([step(1), step(2, **falling)])[1]
    assert points(entropy, 1) == [(1, 0.7), (2, 0.6)]
    assert entropy.get_lines()[1].get_linestyle() == "--"
    assert len(draw([step(1), step(2)])[1].get_lines()) == 1
    unknown = {"aepo/entropy_target": None}  # before a ramp has its start
    assert points(draw([step(1, **unknown), step(2, **falling)])[1], 1) == [(2, 0.6)]


def test_negative_rewards_stay_in_the_picture(draw: Any) -> None:
    assert draw([step(1, reward=-3.0), step(2)])[0].get_ylim()[0] < -3
    assert draw([step(1, reward=0.5), step(2)])[0].get_ylim()[0] == 0


def test_a_live_run_with_a_half_written_line_is_drawn(draw: Any) -> None:
    assert points(draw([step(1)], tail='{"step": 2, "rew')[0]) == [(1, 0.1)]
