"""The figures of the entropy benchmark, drawn from its parts."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.entropy.measures import Part, by_setting, late, trailing_means
from bench.entropy.settings import BASE, OURS

# What was tried and not kept is in the tables alone. Okabe and Ito's colours, which the
# colour-blind tell apart; markers and dashes say the same.
STYLES: dict[str, tuple[str, str, str]] = {
    "base": ("#000000", "*", ":"),
    "grpo": ("#7f7f7f", "s", "-"),
    "published": ("#d55e00", "v", "--"),
    "lift": ("#0072b2", "o", "-"),
    "one_pass": ("#56b4e9", "^", "--"),
    "expected": ("#56b4e9", "d", ":"),
    "entropic": ("#e69f00", "D", "-."),
    "repo_r": ("#cc79a7", "P", "-."),
    "adaptive_bonus": ("#009e73", "X", "-."),
    "era": ("#a6761d", "<", ":"),
    "ucpo": ("#8c510a", ">", ":"),
    "ds_grpo": ("#762a83", "h", ":"),
}
LABELS = {
    "grpo": "GRPO",
    "published": "AEPO as published",
    "lift": "ours",
    "one_pass": "ours, one_pass",
    "expected": "ours, expected",
    "entropic": "EntroPIC",
    "repo_r": "REPO-R",
    "adaptive_bonus": "adaptive bonus",
    "era": "ERA",
    "ucpo": "UCPO",
    "ds_grpo": "DS-GRPO",
}


def draw_all(parts: list[Part], folder: Path) -> list[Path]:
    """Draw all figures of a size, one set per task; returns those that there was something for."""
    drawn = []
    for task in dict.fromkeys(part["task"] for part in parts):
        mine = [part for part in parts if part["task"] == task and part["setting"] in STYLES]
        if any(part["target"] is not None for part in mine):
            drawn.append(draw_entropy(mine, folder / f"{task}-entropy.png"))
        drawn.append(draw_accuracy(mine, folder / f"{task}-accuracy.png"))
        drawn.append(draw_pass_at_k(mine, folder / f"{task}-pass.png"))
    return drawn


def draw_entropy(parts: list[Part], path: Path) -> Path:
    """Entropy over steps, one panel per target, means over 5 steps bold and single steps pale."""
    targets = sorted({part["target"] for part in parts if part["target"] is not None})
    columns = min(len(targets), 2)
    rows = -(-len(targets) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.4 * columns, 3.8 * rows), squeeze=False, sharex=True
    )
    for axis, target in zip(axes.flat, targets, strict=False):
        axis.axhline(target, color="black", linewidth=1, linestyle=(0, (6, 3)))
        axis.axhspan(0.9 * target, 1.1 * target, color="black", alpha=0.08, linewidth=0)
        for part in parts:
            if part["setting"] != BASE and part["target"] in (None, target):
                color, _, dashes = STYLES[part["setting"]]
                steps = range(1, len(part["entropy"]) + 1)
                axis.plot(steps, part["entropy"], color=color, alpha=0.15, linewidth=0.7)
                means = trailing_means(part["entropy"])
                axis.plot(steps, means, color=color, linestyle=dashes, linewidth=1.6)
        axis.set_ylim(0, max(1.6, 2 * target))
        axis.set_title(f"target {target:g} nats, shaded within 10%", fontsize=10)
        _plain(axis)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("entropy, nats per token")
    for axis in list(axes.flat)[len(targets) :]:
        axis.set_visible(False)
    names = [name for name in dict.fromkeys(part["setting"] for part in parts) if name != BASE]
    lines = []
    for name in names:
        color, _, dashes = STYLES[name]
        lines += axes[0, 0].plot([], [], color=color, linestyle=dashes, label=_label(name))
    figure.legend(
        handles=lines,
        loc="outside lower center",
        ncols=min(len(names), 5),
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0.07 if len(names) <= 5 else 0.12, 1, 1))
    return _save(figure, path)


def draw_accuracy(parts: list[Part], path: Path) -> Path:
    """Reward against entropy over the last sixth of the steps, one point a run."""
    figure, axis = plt.subplots(figsize=(6.4, 4.6))
    for target in sorted({part["target"] for part in parts if part["target"] is not None}):
        axis.axvline(target, color="black", alpha=0.25, linewidth=0.8, linestyle=(0, (6, 3)))
    trained = [part for part in parts if part["setting"] != BASE]
    for name in dict.fromkeys(part["setting"] for part in trained):
        color, marker, _ = STYLES[name]
        axis.scatter(
            *zip(*(late(part) for part in trained if part["setting"] == name), strict=True),
            s=48,
            color=color,
            marker=marker,
            label=_label(name),
            edgecolors="white",
            linewidths=0.6,
            zorder=3,
        )
    axis.set_xlabel("entropy, last sixth of the steps, nats per token (dashed: targets)")
    axis.set_ylabel("reward, last sixth of the steps")
    axis.set_xlim(left=0)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _plain(axis)
    figure.tight_layout()
    return _save(figure, path)


def draw_pass_at_k(parts: list[Part], path: Path) -> Path:
    """pass@k of the base model and each setting, mean over seeds; of ours one line a target."""
    figure, axis = plt.subplots(figsize=(6.4, 4.6))
    groups = by_setting(parts)
    for (name, target), group in groups.items():
        common = set.intersection(*(set(p["evaluation"]["pass_at_k"]) for p in group))
        ks = sorted(int(k) for k in common)
        means = [statistics.fmean(p["evaluation"]["pass_at_k"][str(k)] for p in group) for k in ks]
        color, marker, dashes = STYLES[name]
        label = _label(name) + ("" if target is None else f", {target:g}")
        # A method's targets share its colour, the higher the paler.
        aims = [aim for other, aim in groups if other == name]
        alpha = 1 - 0.6 * aims.index(target) / len(aims)
        axis.plot(
            ks, means, color=color, marker=marker, linestyle=dashes, label=label, alpha=alpha,
            markersize=5, linewidth=2.2 if name in (OURS, "grpo", BASE) else 1.2,
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xlabel("k samples a prompt")
    axis.set_ylabel("pass@k")
    axis.set_ylim(0, 1.03)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    _plain(axis)
    figure.tight_layout()
    return _save(figure, path)


def _label(name: str) -> str:
    return LABELS.get(name, name)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2, linewidth=0.6)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path
