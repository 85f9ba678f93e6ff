"""The results of 2026-11-23: one file for many runs, on SmolLM2-135M's products alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.entropy.report import spread


def entropy_before_parts(results: Path, link: Callable[[Path], str]) -> str:
    """Table and figures of the newest result of each setting."""
    latest: dict[str, Path] = {}  # setting -> the newest result that has it
    records: dict[Path, dict[str, Any]] = {}
    for path in sorted(results.glob("*/entropy-*.json"), key=lambda path: path.name):
        record = records[path] = json.loads(path.read_text())
        latest |= dict.fromkeys(record["settings"], path)
    runs, notes, figures = [], [], []
    for path in sorted(set(latest.values()), key=lambda path: path.name, reverse=True):
        record = records[path]
        mine = [run for run in record["runs"] if latest[run["setting"]] == path]
        runs += mine
        notes.append(_note(link(path), record, mine))
        figures.append(f"![entropy, temperature, accuracy]({link(path.with_suffix('.png'))})\n")
    return "\n".join([_table(runs), "", *notes, "", *figures]) if runs else ""


def _note(link: str, record: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    seeds = len({run["seed"] for run in runs})
    spreads = "one seed" if seeds == 1 else f"{seeds} seeds, mean (min to max)"
    names = ", ".join(dict.fromkeys(run["setting"] for run in runs))
    where = record["environment"]
    return (
        f"{names}: SmolLM2-135M on one-digit products, {len(runs[0]['entropy'])} steps, {spreads}; "
        f"{where['cpu']}, torch {where['torch']} ([raw]({link}))."
    )


def _table(results: list[dict[str, Any]]) -> str:
    rows = [
        "| setting | H0 | entropy, last half | mean of abs(H - H0) / H0 | held-out accuracy |",
        "|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((r["setting"], r["target"]) for r in results):
        group = [r for r in results if (r["setting"], r["target"]) == key]
        error = spread([r["late_error"] for r in group], percent=True) if key[1] else "-"
        rows.append(
            f"| {key[0]} | {key[1] or '-'} | {spread([r['late_entropy'] for r in group])} "
            f"| {error} | {spread([r['late_heldout'] for r in group])} |"
        )
    return "\n".join(rows)
