"""The picture of a run: reward, entropy against its target, temperature, lengths."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from aepo_fast.config.errors import ConfigError
from aepo_fast.report.json_lines import read_lines
from aepo_fast.report.moving_mean import SMOOTHED_STEPS, MovingMean

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#888888"
Line = dict[str, Any]


def plot_run(folder: Path | str, output: Path | None = None) -> Path:
    """Draw `folder`/metrics.jsonl as `output`, `folder`/plot.png unless given; returns the file.

    Raises ConfigError without metrics, and where the file cannot be written.
    """
    folder = Path(folder).expanduser()
    source = folder / "metrics.jsonl"
    try:
        lines = read_lines(source) if source.exists() else []
    except OSError as error:
        reason = f"its metrics.jsonl cannot be read: {error.strerror}"
        raise ConfigError("RUN", str(folder), reason, "Make it readable") from error
    # A step none of whose samples has a reward says null.
    steps = [line for line in lines if "reward" in line]
    if not steps:
        reason = "has no step in a metrics.jsonl"
        raise ConfigError("RUN", str(folder), reason, "Name the output_dir of a run")
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True)
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
    path = output.expanduser() if output else folder / "plot.png"
    # Whole or not at all: a live run draws the same file at its end.
    draft = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(draft, dpi=130, format=path.suffix[1:] or "png")
        draft.replace(path)
    except OSError as error:
        reason = f"{path.name} cannot be written there: {error.strerror}"
        fix = "Name another file with --output FILE"
        raise ConfigError("RUN", str(path.parent), reason, fix) from error
    except ValueError as error:  # an ending that matplotlib does not know
        reason = str(error).splitlines()[0]
        raise ConfigError("--output", str(path), reason, "Use .png, .pdf or .svg") from error
    finally:
        plt.close(figure)
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    return path


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float))


def _draw_reward(axis: Axes, steps: list[Line], evals: list[Line]) -> None:
    _series(axis, steps, "reward", BLUE, "training")
    names = ("eval/avg@k", "eval/ci95_low", "eval/ci95_high")
    evals = [line for line in evals if all(_is_number(line.get(name)) for name in names)]
    if evals:
        at = [line["step"] for line in evals]
        low, high = ([line[f"eval/ci95_{end}"] for line in evals] for end in ("low", "high"))
        axis.vlines(at, low, high, color=ORANGE)
        means = [line["eval/avg@k"] for line in evals]
        axis.plot(at, means, "o", color=ORANGE, label="held out, T = 1, with 95% interval")
    _from_zero(axis)
    _title(axis, "Reward", axis)


def _draw_entropy(axis: Axes, steps: list[Line]) -> None:
    marker = "" if len(steps) > 1 else "."  # one step alone makes no line
    thin = {"linewidth": 1, "alpha": 0.45, "marker": marker}
    bold = {"linewidth": 2.4, "marker": marker}
    _series(axis, steps, "entropy", BLUE, "each step", **thin)
    label = f"mean of {SMOOTHED_STEPS} steps"
    _series(axis, with_smoothed(steps), "entropy_smoothed", BLUE, label, **bold)
    # T stays 1 in a run without AEPO, which has no target to show.
    name = "aepo/entropy_target"
    aims = [line[name] for line in steps if _is_number(line.get(name))]
    if aims and any(line.get("aepo/temperature", 1) != 1 for line in steps):
        aim = aims[-1]
        dashed = {"linestyle": "--", "marker": marker}
        _series(axis, steps, name, ORANGE, f"target {aim:g}", **dashed)
    _from_zero(axis)
    _title(axis, "Token entropy at T = 1 (nats)", axis)


def with_smoothed(steps: list[Line]) -> list[Line]:
    """The steps with entropy_smoothed, computed as the trainer does where the log lacks it."""
    mean = MovingMean()
    return [{"entropy_smoothed": mean.update(line.get("entropy")), **line} for line in steps]


def _draw_temperature(axis: Axes, steps: list[Line]) -> None:
    _series(axis, steps, "aepo/temperature", BLUE, None)
    axis.axhline(1, color=GREY, linewidth=0.8)
    _title(axis, "AEPO temperature T")


def _draw_lengths(axis: Axes, steps: list[Line]) -> None:
    _series(axis, steps, "completions/mean_length", BLUE, "mean tokens")
    _from_zero(axis)
    cut = axis.twinx()
    cut.spines["top"].set_visible(False)
    _series(cut, steps, "completions/clipped_ratio", ORANGE, "share cut off (right)")
    cut.set_ylim(0, 1)
    _title(axis, "Completion length", axis, cut)


def _series(
    axis: Axes, lines: list[Line], name: str, color: str, label: str | None, **style: Any
) -> None:
    """A line through the steps that have a finite value."""
    values = ((line["step"], line.get(name)) for line in lines)
    points = [(step, y) for step, y in values if _is_number(y) and math.isfinite(y)]
    axis.plot(*zip(*points, strict=True), color=color, label=label, **{"marker": ".", **style})


def _title(axis: Axes, title: str, *labelled: Axes) -> None:
    """A title, and under it the labels of some axes: above the lines, which they never hide."""
    axis.set_title(title, loc="left", fontweight="bold", pad=24)
    parts = [one.get_legend_handles_labels() for one in labelled]
    if parts:
        axis.legend(
            handles=[handle for handles, _ in parts for handle in handles],
            loc="lower left",
            bbox_to_anchor=(-0.01, 0.985),
            ncol=3,
            frameon=False,
            fontsize="small",
            borderaxespad=0.3,
            columnspacing=1.4,
            handlelength=1.8,
        )


def _from_zero(axis: Axes) -> None:
    # Rewards of a user's own function may be negative.
    if axis.dataLim.y0 >= 0:
        axis.set_ylim(bottom=0)
