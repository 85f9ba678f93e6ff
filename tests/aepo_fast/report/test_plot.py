"""The picture of a run shows what the log says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.axes import Axes

from aepo_fast.report.plot import plot_run

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


def labelled(axis: Axes) -> dict[str, list[tuple[float, float]]]:
    return {str(line.get_label()): points(axis, i) for i, line in enumerate(axis.get_lines())}


def test_entropy_is_shown_smoothed_beside_each_step(draw: Any) -> None:
    raw = [2.0, 1.0, None, 3.0, 1.0, 0.5, 0.25]
    mean = [2.0, 1.5, 1.5, 2.0, 7 / 4, 7.5 / 5, 5.75 / 5]
    old = [step(i + 1, entropy=value) for i, value in enumerate(raw)]
    lines = labelled(draw(old)[1])
    assert lines["each step"] == [(i + 1, x) for i, x in enumerate(raw) if x is not None]
    assert lines["mean of 5 steps"] == [(i + 1, x) for i, x in enumerate(mean)]
    # What was logged is drawn as it is; steps from before that are filled in.
    new = [*old[:4], *(line | {"entropy_smoothed": 9.0} for line in old[4:])]
    smooth = labelled(draw(new)[1])["mean of 5 steps"]
    assert smooth == [(i + 1, x) for i, x in enumerate([*mean[:4], 9, 9, 9])]


def test_steps_before_the_first_entropy_have_no_mean(draw: Any) -> None:
    lines = labelled(draw([step(1, entropy=None), step(2)])[1])
    assert lines["each step"] == lines["mean of 5 steps"] == [(2, 0.8)]


def test_legends_stand_above_the_lines(draw: Any) -> None:
    axes = draw([step(1), step(2, **{"aepo/temperature": 1.2}), {"step": 2, **EVAL}])
    renderer = axes[0].get_figure().canvas.get_renderer()
    for axis in (axes[0], axes[1], axes[3]):
        legend = axis.get_legend().get_window_extent(renderer)
        title = axis._left_title.get_window_extent(renderer)
        assert axis.bbox.y1 <= legend.y0 + 1 and legend.y1 <= title.y0 + 1
        assert legend.x1 <= axis.bbox.x1


def test_the_target_is_drawn_only_where_aepo_is_at_work(draw: Any) -> None:
    falling = {"aepo/temperature": 1.2, "aepo/entropy_target": 0.6}
    entropy = draw([step(1), step(2, **falling)])[1]
    assert labelled(entropy)["target 0.6"] == [(1, 0.7), (2, 0.6)]
    assert entropy.get_lines()[2].get_linestyle() == "--"
    assert labelled(draw([step(1), step(2)])[1]).keys() == {"each step", "mean of 5 steps"}
    unknown = {"aepo/entropy_target": None}  # as older runs have it
    assert labelled(draw([step(1, **unknown), step(2, **falling)])[1])["target 0.6"] == [(2, 0.6)]


def test_negative_rewards_stay_in_the_picture(draw: Any) -> None:
    assert draw([step(1, reward=-3.0), step(2)])[0].get_ylim()[0] < -3
    assert draw([step(1, reward=0.5), step(2)])[0].get_ylim()[0] == 0


def test_a_live_run_with_a_half_written_line_is_drawn(draw: Any) -> None:
    assert points(draw([step(1)], tail='{"step": 2, "rew')[0]) == [(1, 0.1)]
