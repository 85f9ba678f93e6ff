"""Tables and figures of the finished runs, from their parts."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from bench.entropy import verdict
from bench.entropy.measures import Part, by_setting, late
from bench.entropy.settings import BASE, SETTINGS, TRIED

_HEAD = (
    "setting",
    "H0",
    "entropy, last half",
    "off H0, mean",
    "off H0, most",
    "reward, last sixth",
    "accuracy at T = 1",
    "greedy",
    "pass@k",
    "distinct right",
)


def load(folder: Path) -> list[Part]:
    """The parts of a size on a device: base first, then by setting, target and seed."""
    order = [BASE, *SETTINGS, *TRIED]
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(
        parts, key=lambda p: (p["task"], order.index(p["setting"]), p["target"] or 0, p["seed"])
    )


def folders(size: str, results: Path) -> list[Path]:
    """Where the parts of a size lie, a folder per device."""
    return [path for path in sorted(results.glob(f"*/entropy/{size}")) if any(path.glob("*.json"))]


def write(size: str, results: Path) -> None:
    """Print and write the tables of a size, and draw its figures."""
    from bench.entropy.figures import draw_all

    for folder in folders(size, results):
        parts = load(folder)
        text = "\n\n".join(["**Targets**", verdict.table(parts), *tables(parts)])
        (folder / "tables.md").write_text(text + "\n")
        print(f"{text}\n\nresult: {folder}")
        for figure in draw_all(parts, folder):
            print(f"figure: {figure}")


def tables(parts: list[Part]) -> list[str]:
    """One Markdown table per task, each below its name."""
    tasks = dict.fromkeys(part["task"] for part in parts)
    return [
        f"**{task}**\n\n{table([part for part in parts if part['task'] == task])}" for task in tasks
    ]


def table(parts: list[Part]) -> str:
    """One row per setting and target: means over seeds, in brackets the least and the most."""
    rows = [f"| {' | '.join(_HEAD)} |", "|---" * len(_HEAD) + "|"]
    for group in by_setting(parts).values():
        rows.append(f"| {' | '.join(_cells(group))} |")
    return "\n".join(rows)


def _cells(group: list[Part]) -> list[str]:
    first, found = group[0], [part["evaluation"] for part in group]
    held = [part["held"] for part in group if "held" in part]
    rewards = [late(part)[1] for part in group if "reward" in part]
    entropies = [part.get("late_entropy", part["evaluation"]["entropy"]) for part in group]
    k = min((max(map(int, one["pass_at_k"])) for one in found), default=1)
    return [
        first["setting"],
        "-" if first["target"] is None else f"{first['target']:g}",
        spread(entropies),
        spread([one["mean"] for one in held], percent=True) if held else "-",
        f"{max(one['max'] for one in held):.0%}" if held else "-",
        spread(rewards, digits=3) if rewards else "-",
        _accuracy(found),
        spread([one["greedy_accuracy"] for one in found]),
        f"{spread([one['pass_at_k'][str(k)] for one in found])} (k = {k})",
        spread([one["distinct_right"] for one in found], digits=1),
    ]


def _accuracy(found: list[dict[str, Any]]) -> str:
    if len(found) > 1:
        return spread([one["accuracy"] for one in found], digits=3)
    low, high = found[0]["ci95"]
    return f"{found[0]['accuracy']:.3f} (95% {low:.3f} to {high:.3f})"


def spread(values: list[float], *, percent: bool = False, digits: int = 2) -> str:
    """The mean, and behind it the least and the most where there are several."""

    def shown(value: float) -> str:
        return f"{value:.0%}" if percent else f"{value:.{digits}f}"

    mean = shown(statistics.fmean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ({shown(min(values))} to {shown(max(values))})"


def note(parts: list[Part]) -> str:
    """What a table's runs were, in one sentence."""
    trained = [part for part in parts if part["setting"] != BASE]
    seeds = len({part["seed"] for part in trained})
    steps = max((len(part["entropy"]) for part in trained), default=0)
    where, one = parts[0]["environment"], parts[0]["evaluation"]
    return (
        f"{steps} steps, {'one seed' if seeds == 1 else f'up to {seeds} seeds'}; {one['prompts']} "
        f"{one['of']}, {one['samples']} samples each, distinct ones of {one['distinct_draws']}; "
        f"off H0: means of 5 steps over the last half; {where['cpu']}, torch {where['torch']}"
    )
