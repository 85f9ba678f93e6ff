"""The picture of a run: reward, entropy against its target, temperature, lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from aepo_fast.config import ConfigError

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#888888"


def plot_run(folder: Path | str) -> Path:
    """Draw `folder`/metrics.jsonl as `folder`/plot.png; raises ConfigError without metrics."""
    folder = Path(folder)
    source = folder / "metrics.jsonl"
    lines = []
    if source.exists():
        lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "reward" in line]
    if not steps:
        reason = "has no step in a metrics.jsonl"
        raise ConfigError("RUN", str(folder), reason, "Name the output_dir of a run")
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True)
    reward, entropy, temperature, length = axes.flat
    _series(reward, steps, "reward", BLUE, "reward, training")
    evals = [line for line in lines if line.get("eval/avg@k") is not None]
    if evals:
        means = [line["eval/avg@k"] for line in evals]
        spread = [
            [line["eval/avg@k"] - line["eval/ci95_low"] for line in evals],
            [line["eval/ci95_high"] - line["eval/avg@k"] for line in evals],
        ]
        reward.errorbar(
            [line["step"] for line in evals],
            means,
            yerr=spread,
            fmt="o",
            color=ORANGE,
            capsize=3,
            label="held-out accuracy at T = 1, 95%",
        )
    reward.set_title("Reward")
    reward.set_ylim(bottom=0)
    _series(entropy, steps, "entropy", BLUE, "policy")
    if len({line["aepo/temperature"] for line in steps}) > 1:
        target = steps[-1]["aepo/entropy_target"]
        entropy.axhline(target, color=ORANGE, linestyle="--", label=f"target {target:g}")
    entropy.set_title("Token entropy at T = 1 (nats)")
    entropy.set_ylim(bottom=0)
    _series(temperature, steps, "aepo/temperature", BLUE, None)
    temperature.axhline(1, color=GREY, linewidth=0.8)
    temperature.set_title("AEPO temperature T")
    _series(length, steps, "completions/mean_length", BLUE, "mean tokens")
    length.set_title("Completion length")
    length.set_ylim(bottom=0)
    cut = length.twinx()
    _series(cut, steps, "completions/clipped_ratio", ORANGE, "share cut off")
    cut.set_ylim(0, 1)
    handles = [axis.get_legend_handles_labels() for axis in (length, cut)]
    length.legend(handles[0][0] + handles[1][0], handles[0][1] + handles[1][1], frameon=False)
    for axis in (reward, entropy):
        axis.legend(frameon=False)
    for axis in (temperature, length):
        axis.set_xlabel("step")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path = folder / "plot.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _series(
    axis: Axes, lines: list[dict[str, Any]], name: str, color: str, label: str | None
) -> None:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    axis.plot(*zip(*points, strict=True), color=color, marker=".", label=label)
