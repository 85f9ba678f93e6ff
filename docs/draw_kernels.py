"""Draws docs/kernels.png: what happens to one chunk of tokens."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

GEMM, ROWS, LOSS, DATA = "#0072B2", "#009E73", "#D55E00", "#555555"


def box(axes: Axes, x: float, y: float, text: str, color: str, width: float = 2.3) -> None:
    axes.text(
        x + width / 2,
        y,
        text,
        ha="center",
        va="center",
        fontsize=9,
        color="white",
        bbox={"boxstyle": "round,pad=0.5", "facecolor": color, "edgecolor": "none"},
    )


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": DATA, "lw": 1.2})
    if text:
        middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(middle[0], middle[1] + 0.12, text, ha="center", fontsize=8, color=DATA)


def main() -> None:
    """Write the picture beside this file."""
    figure, axes = plt.subplots(figsize=(11, 4.4))
    axes.set_xlim(0, 13)
    axes.set_ylim(0, 4.4)
    axes.axis("off")
    box(axes, 0.2, 3.4, "GEMM 1\nhidden_c  W$^T$", GEMM)
    box(axes, 3.6, 3.4, "row statistics\none read", ROWS)
    box(axes, 7.0, 3.4, "your loss\nPyTorch on [C]", LOSS)
    box(axes, 10.3, 3.4, "its derivatives\nc$_{lp}$, c$_H$, c$_2$  [C]", LOSS)
    box(axes, 3.6, 1.9, "row gradients\none read, one write, in place", ROWS)
    box(axes, 1.2, 0.6, "GEMM 2\ndhidden_c = dlogits  W", GEMM)
    box(axes, 6.2, 0.6, "GEMM 3\ndW += dlogits$^T$ hidden_c   (fp32)", GEMM)
    arrow(axes, (2.25, 3.4), (3.75, 3.4), "logits [C, V]")
    arrow(axes, (5.75, 3.4), (7.1, 3.4), "log-prob, H  [C]")
    arrow(axes, (9.2, 3.4), (10.4, 3.4))
    arrow(axes, (11.4, 2.95), (6.3, 1.95))
    axes.text(9.6, 2.05, "one number of each per row", fontsize=8, color=DATA, ha="center")
    arrow(axes, (1.9, 2.95), (3.7, 2.1), "")
    axes.text(1.55, 2.35, "the same logits,\nstill in memory", fontsize=8, color=DATA, ha="center")
    arrow(axes, (4.2, 1.45), (2.9, 1.05), "")
    arrow(axes, (5.4, 1.45), (6.9, 1.05), "")
    axes.text(4.75, 1.15, "dlogits [C, V]", fontsize=8, color=DATA, ha="center")
    figure.savefig(Path(__file__).with_name("kernels.png"), dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
