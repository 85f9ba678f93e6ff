"""Tables of the kernel benchmark: one per case and mode, and a summary for the README."""

from __future__ import annotations

from typing import Any

UNTIMED = ("incorrect", "failed")


def unavailable_list(record: dict[str, Any]) -> str:
    """What could not run on this machine and why, one line each."""
    lines = [f"- {name}: {reason}" for name, reason in record["unavailable"].items()]
    return "\n".join(["Not available here:", *lines]) if lines else "Everything is available here."


def case_table(case: dict[str, Any]) -> str:
    """A case's modes as Markdown tables."""
    head = f"## H {case['hidden']}, V {case['vocab']}, N {case['tokens']}"
    if not case.get("modes"):
        return f"{head}\n\n{case.get('message', 'nothing was run')}\n"
    return "\n".join([head, "", *(mode_table(mode) for mode in case["modes"].values())])


def mode_table(mode: dict[str, Any]) -> str:
    """One mode: a row for the bare GEMMs and one per candidate, fastest first."""
    floor = mode["floor"]
    names = ours_in(mode)
    heads = ["candidate", "ms (p20 to p80)", "/ floor", *(f"/ {name}" for name in names)]
    heads += ["peak extra memory", "error / torch's", "says"]
    rows = [
        f"### {mode['title']}",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
        f"| bare {floor['name']} | {_spread(floor)} | 1.00 |" + " |" * (len(names) + 3),
    ]
    candidates = mode["candidates"]
    order = sorted(candidates, key=lambda name: candidates[name].get("median_ms", float("inf")))
    rows += [_row(name, candidates[name], names) for name in order]
    return "\n".join(rows) + "\n"


def ours_in(mode: dict[str, Any]) -> list[str]:
    """The candidate that the others are compared with, if it was timed: the first of ours."""
    for name, found in mode["candidates"].items():
        if found.get("ratio_to_ours") and name in found["ratio_to_ours"]:
            return [name]
    return []


def _row(name: str, found: dict[str, Any], ours: list[str]) -> str:
    status = found["status"]
    if status == "excluded":
        cells = ["-", "-", *("-" for _ in ours), "-", "-", found["message"]]
        return f"| {name} | {' | '.join(cells)} |"
    says = ", ".join(part for part in (found.get("lacks", ""), found["message"]) if part)
    if status in UNTIMED:
        cells = [status, "-", *("-" for _ in ours), "-", worst_error(found), says]
        return f"| {name} | {' | '.join(cells)} |"
    ratios = [f"{found['ratio_to_ours'][ours_name]:.2f}" for ours_name in ours]
    memory = found.get("peak_extra_bytes")
    cells = [
        _spread(found),
        f"{found['ratio_to_floor']:.2f}",
        *ratios,
        "not measured" if memory is None else f"{memory / 2**20:,.0f} MiB",
        worst_error(found),
        says,
    ]
    return f"| {name} | {' | '.join(cells)} |"


def worst_error(found: dict[str, Any]) -> str:
    """The largest error as a multiple of the baseline's, and of what; "-" if it never ran."""
    ratios = [
        (ratio, name)
        for name, kinds in found.get("error_ratios", {}).items()
        for ratio in kinds.values()
        if ratio is not None
    ]
    if not ratios:
        return "-"
    ratio, name = max(ratios)
    return f"{ratio:.2g} ({name})"


def _spread(times: dict[str, Any]) -> str:
    return f"{times['median_ms']:.3g} ({times['p20_ms']:.3g} to {times['p80_ms']:.3g})"
