"""The figure of the kernel benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHERS = "#0072b2", "#999999"
MODES = ("forward", "training")


def draw(record: dict[str, Any], path: Path) -> Path:
    """Time over the bare GEMMs' as bars: a row per mode, a column per shape at one token count."""
    cases = shown_cases(record)
    modes = [name for name in MODES if all(name in case["modes"] for case in cases)]
    figure, axes = plt.subplots(
        max(1, len(modes)),
        max(1, len(cases)),
        figsize=(2.2 + 3.4 * max(1, len(cases)), 0.6 + 3.2 * max(1, len(modes))),
        squeeze=False,
        sharey="row",
    )
    for row, mode in enumerate(modes):
        names = _names(cases, mode)
        for column, case in enumerate(cases):
            _bars(axes[row, column], case["modes"][mode], names)
            if row == 0:
                axes[row, column].set_title(
                    f"H {case['hidden']}, V {case['vocab']}, N {case['tokens']}", fontsize=9
                )
        axes[row, 0].set_yticks(range(len(names)), names, fontsize=8)
        axes[row, 0].invert_yaxis()
        axes[row, 0].set_ylabel(mode)
        for axis in axes[row]:
            axis.set_xlabel(f"time / {cases[0]['modes'][mode]['floor']['name']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def shown_cases(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One case per shape: 8192 tokens where that was run, or else the most."""
    cases = [case for case in record["cases"] if case.get("modes")]
    chosen: dict[tuple[int, int], dict[str, Any]] = {}
    for case in cases:
        key = case["hidden"], case["vocab"]
        if key not in chosen or _rank(case) > _rank(chosen[key]):
            chosen[key] = case
    return list(chosen.values())


def _rank(case: dict[str, Any]) -> tuple[bool, int]:
    return case["tokens"] == 8192, case["tokens"]


def _names(cases: list[dict[str, Any]], mode: str) -> list[str]:
    names: dict[str, None] = {}
    for case in cases:
        for name, found in case["modes"][mode]["candidates"].items():
            if found["status"] != "excluded":
                names[name] = None
    return list(names)


def _bars(axis: Any, mode: dict[str, Any], names: list[str]) -> None:
    for index, name in enumerate(names):
        found = mode["candidates"].get(name, {"status": "not run"})
        ratio = found.get("ratio_to_floor")
        if ratio is None:
            axis.text(1.02, index, found["status"], va="center", fontsize=7, color="#d55e00")
            continue
        axis.barh(index, ratio, color=OURS if name.startswith("ours") else OTHERS, height=0.7)
        text = f"{ratio:.2f}" + (f"  {found['lacks']}" if found["lacks"] else "")
        axis.text(ratio, index, f" {text}", va="center", fontsize=7)
    axis.axvline(1, color="black", linestyle="--", linewidth=1)
    axis.margins(x=0.3)
    axis.spines[["top", "right"]].set_visible(False)
