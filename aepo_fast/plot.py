"""The picture of a run: reward, entropy against its target, temperature, lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from aepo_fast.config import ConfigError
from aepo_fast.metrics import read_lines

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#888888"
Line = dict[str, Any]


def plot_run(folder: Path | str) -> Path:
    """Draw `folder`/metrics.jsonl as `folder`/plot.png; raises ConfigError without metrics."""
    folder = Path(folder)
    source = folder / "metrics.jsonl"
    lines = read_lines(source) if source.exists() else []
    steps = [line for line in lines if "reward" in line]
    if not steps:
        reason = "has no step in a metrics.jsonl"
        raise ConfigError("RUN", str(folder), reason, "Name the output_dir of a run")
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    _draw_reward(axes[0, 0], steps, [line for line in lines if "eval/avg@k" in line])
    _draw_entropy(axes[0, 1], steps)
    _draw_temperature(axes[1, 0], steps)
    _draw_lengths(axes[1, 1], steps)
    for axis in axes[1]:
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout()
    path = folder / "plot.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_reward(axis: Axes, steps: list[Line], evals: list[Line]) -> None:
    _series(axis, steps, "reward", BLUE, "training")
    if evals:
        at = [line["step"] for line in evals]
        low, high = ([line[f"eval/ci95_{end}"] for line in evals] for end in ("low", "high"))
        axis.vlines(at, low, high, color=ORANGE)
        means = [line["eval/avg@k"] for line in evals]
        axis.plot(at, means, "o", color=ORANGE, label="held out, T = 1, with 95% interval")
    axis.set_title("Reward")
    _from_zero(axis)
    axis.legend(frameon=False)


def _draw_entropy(axis: Axes, steps: list[Line]) -> None:
    _series(axis, steps, "entropy", BLUE, "policy")
    # T stays 1 in a run without AEPO, which has no target to show.
    if any(line["aepo/temperature"] != 1 for line in steps):
        name = "aepo/entropy_target"
        aim = [line[name] for line in steps if line.get(name) is not None][-1]
        _series(axis, steps, name, ORANGE, f"target {aim:g}", linestyle="--", marker="")
    axis.set_title("Token entropy at T = 1 (nats)")
    _from_zero(axis)
    axis.legend(frameon=False)


def _draw_temperature(axis: Axes, steps: list[Line]) -> None:
    _series(axis, steps, "aepo/temperature", BLUE, None)
    axis.axhline(1, color=GREY, linewidth=0.8)
    axis.set_title("AEPO temperature T")


def _draw_lengths(axis: Axes, steps: list[Line]) -> None:
    _series(axis, steps, "completions/mean_length", BLUE, "mean tokens")
    axis.set_title("Completion length")
    _from_zero(axis)
    cut = axis.twinx()
    cut.spines["top"].set_visible(False)
    _series(cut, steps, "completions/clipped_ratio", ORANGE, "share cut off (right)")
    cut.set_ylim(0, 1)
    axis.legend(handles=[*axis.get_lines(), *cut.get_lines()], frameon=False)


def _series(
    axis: Axes, lines: list[Line], name: str, color: str, label: str | None, **style: Any
) -> None:
    """A line through the steps that have a finite value."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    axis.plot(*zip(*points, strict=True), color=color, label=label, **{"marker": ".", **style})


def _from_zero(axis: Axes) -> None:
    # Rewards of a user's own function may be negative.
    if axis.dataLim.y0 >= 0:
        axis.set_ylim(bottom=0)
