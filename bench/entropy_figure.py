"""The figure of the entropy benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"grpo": "#888888", "published": "#d55e00", "best": "#0072b2"}


def draw(record: dict[str, Any], path: Path) -> Path:
    """Entropy, temperature and held-out accuracy against steps, a column per target."""
    runs = record["runs"]
    targets = sorted({run["target"] for run in runs if run["target"] is not None})
    figure, axes = plt.subplots(
        3, len(targets), figsize=(5.2 * len(targets), 8), sharex=True, squeeze=False
    )
    for column, target in enumerate(targets):
        entropy, temperature, heldout = axes[:, column]
        entropy.axhline(target, color="black", linestyle="--", linewidth=1)
        entropy.axhspan(0.9 * target, 1.1 * target, color="black", alpha=0.08)
        seen = set()
        for run in runs:
            if run["target"] not in (None, target):
                continue
            color = COLORS[run["setting"]]
            label = None if run["setting"] in seen else run["setting"]
            seen.add(run["setting"])
            steps = range(1, len(run["entropy"]) + 1)
            entropy.plot(steps, run["entropy"], color=color, alpha=0.8, label=label)
            if run["target"] is not None:
                temperature.plot(steps, run["temperature"], color=color, alpha=0.8)
            heldout.plot(*zip(*run["heldout"], strict=True), color=color, alpha=0.8, marker="o")
        entropy.set_title(f"H0 = {target:g} nats")
        entropy.legend(frameon=False)
        heldout.set_xlabel("step")
        heldout.set_ylim(0, 1)
    for row, name in enumerate(("entropy, nats", "temperature T", "held-out accuracy at T = 1")):
        axes[row, 0].set_ylabel(name)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
