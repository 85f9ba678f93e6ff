"""The figure of the kernel benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.kernels.table import SUMMARY_MODES, shown_cases

OURS, OTHERS = "#0072b2", "#999999"
_PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # or the line would cross figures


def draw(record: dict[str, Any], path: Path) -> Path:
    """Time over the bare GEMMs' as bars: a row per mode, a column per shape at one token count."""
    cases = shown_cases(record)
    rows = [name for name in SUMMARY_MODES if any(_mode(case, name) for case in cases)]
    names = {row: _names(cases, row) for row in rows}
    heights = [0.9 + 0.32 * len(names[row]) for row in rows] or [1.0]
    figure, axes = plt.subplots(
        len(heights),
        max(1, len(cases)),
        figsize=(2.6 + 3.0 * max(1, len(cases)), 0.3 + sum(heights)),
        height_ratios=heights,
        squeeze=False,
        sharey="row",
    )
    for row, name in enumerate(rows):
        for axis, case in zip(axes[row], cases, strict=True):
            mode = _mode(case, name)
            if mode is None:
                axis.text(0.5, 0.5, "not run", transform=axis.transAxes, ha="center")
                continue
            _bars(axis, mode, names[name])
            axis.set_xlabel(f"time / {mode['floor']['name']}", fontsize=8)
            axis.set_title(f"H {case['hidden']}, V {case['vocab']}, N {case['tokens']}", fontsize=9)
        labels = [_label(candidate, cases, name) for candidate in names[name]]
        axes[row, 0].set_yticks(range(len(labels)), labels, fontsize=8)
        axes[row, 0].invert_yaxis()
        axes[row, 0].set_ylabel(name)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _mode(case: dict[str, Any], name: str) -> dict[str, Any] | None:
    mode = case["modes"].get(name)
    return mode if mode and "floor" in mode else None


def _names(cases: list[dict[str, Any]], mode: str) -> list[str]:
    names: dict[str, None] = {}
    for found_mode in filter(None, (_mode(case, mode) for case in cases)):
        for name, found in found_mode["candidates"].items():
            if found["status"] != "excluded":
                names[name] = None
    return list(names)


def _label(name: str, cases: list[dict[str, Any]], mode: str) -> str:
    """A candidate's name, with what it leaves out on a second line."""
    modes = filter(None, (_mode(case, mode) for case in cases))
    found = (each["candidates"].get(name, {}) for each in modes)
    lacks = next((each["lacks"] for each in found if each.get("lacks")), "")
    return f"{name}\n({lacks})" if lacks else name


def _bars(axis: Any, mode: dict[str, Any], names: list[str]) -> None:
    for index, name in enumerate(names):
        found = mode["candidates"].get(name, {"status": "not run"})
        ratio = found.get("ratio_to_floor")
        if ratio is None:
            axis.text(1.02, index, found["status"], va="center", fontsize=7, color="#d55e00")
            continue
        axis.barh(index, ratio, color=OURS if name.startswith("ours") else OTHERS, height=0.7)
        end = ratio + 0.02 * max(1, ratio)
        axis.text(end, index, f"{ratio:.2f}", va="center", fontsize=7, bbox=_PLAIN)
    axis.axvline(1, color="black", linestyle="--", linewidth=1)
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)
