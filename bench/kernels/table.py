"""Tables of the kernel benchmark: one per case and mode, a summary, and the README's headline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNTIMED = ("incorrect", "failed")
# What the pages and the figure show of a run.
SUMMARY_MODES = ("forward", "training", "frozen")
SUMMARY_TOKENS = 8192
# The rows of the README's table, of training: those that compute entropy and a temperature too.
HEADLINE_MODE = "training"
HEADLINE = (
    "ours (chunked)",
    "torch.compile",
    "torch eager",
    "Liger scaled CE",
    "TRL chunked",
    "verl Triton",
)


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
    if "floor" not in mode:
        return f"### {mode['title']}\n\n{mode['message']}\n"
    floor = mode["floor"]
    names = ours_in(mode)
    heads = ["candidate", "ms (p20 to p80)", "/ floor", *(f"/ {name}" for name in names)]
    heads += ["peak extra memory", "errors / torch's", "says"]
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


def compares(record: dict[str, Any]) -> bool:
    """Whether a record has times of more than one candidate."""
    modes = (mode for case in record["cases"] for mode in case.get("modes", {}).values())
    return any(
        sum(found["status"] == "ok" for found in mode.get("candidates", {}).values()) > 1
        for mode in modes
    )


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
        cells = [status, "-", *("-" for _ in ours), "-", all_errors(found), says]
        return f"| {name} | {' | '.join(cells)} |"
    ratios = [f"{found['ratio_to_ours'][ours_name]:.2f}" for ours_name in ours]
    memory = found.get("peak_extra_bytes")
    cells = [
        _spread(found),
        f"{found['ratio_to_floor']:.2f}",
        *ratios,
        "not measured" if memory is None else f"{memory / 2**20:,.0f} MiB",
        all_errors(found),
        says,
    ]
    return f"| {name} | {' | '.join(cells)} |"


def all_errors(found: dict[str, Any]) -> str:
    """Each value's error as a multiple of the baseline's, rms or largest, whichever is worse."""
    parts = []
    for name, kinds in found.get("error_ratios", {}).items():
        known = [ratio for ratio in kinds.values() if ratio is not None]
        parts.append(f"{name} {max(known):.2g}" if known else f"{name} -")
    return ", ".join(parts) or "-"


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
    return f"{_ms(times['median_ms'])} ({_ms(times['p20_ms'])} to {_ms(times['p80_ms'])})"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def summary(record: dict[str, Any]) -> str:
    """A run in short: for three modes, time over the bare GEMMs' per candidate and shape."""
    return "\n".join(filter(None, (_by_shape(record, name) for name in SUMMARY_MODES)))


def headline(record: dict[str, Any]) -> str:
    """The summary's table of training, with the rows of HEADLINE alone."""
    return _by_shape(record, HEADLINE_MODE, HEADLINE)


def _by_shape(record: dict[str, Any], name: str, only: Sequence[str] | None = None) -> str:
    """A mode's times over the bare GEMMs', a row per candidate and a column per shape.

    only: the candidates to show, in this order. Empty where the mode was not run.
    """
    cases = shown_cases(record)
    modes = [case["modes"].get(name) for case in cases]
    modes = [mode if mode and "floor" in mode else None for mode in modes]
    found = [mode for mode in modes if mode is not None]
    if not found:
        return ""
    titles = [f"H {case['hidden']}, V {case['vocab']}, N {case['tokens']}" for case in cases]
    floors = ["-" if mode is None else f"{_ms(mode['floor']['median_ms'])} ms" for mode in modes]
    rows = [
        f"{found[0]['title'][0].upper()}{found[0]['title'][1:]}:",
        "",
        f"| | {' | '.join(titles)} |",
        "|---|" + "---|" * len(titles),
        f"| bare {found[0]['floor']['name']} | {' | '.join(floors)} |",
    ]
    for candidate in only or {key: None for mode in found for key in mode["candidates"]}:
        each = [None if mode is None else mode["candidates"].get(candidate) for mode in modes]
        if all(one is None or one["status"] == "excluded" for one in each):
            continue
        lacks = next((one["lacks"] for one in each if one and one.get("lacks")), "")
        label = f"{candidate} ({lacks})" if lacks else candidate
        rows.append(f"| {label} | {' | '.join(map(_short, each))} |")
    return "\n".join(rows) + "\n"


def _short(found: dict[str, Any] | None) -> str:
    if found is None or found["status"] == "excluded":
        return "-"
    if found["status"] == "incorrect":
        return f"incorrect: error {worst_error(found)}"
    if "ratio_to_floor" not in found:
        return found["status"]
    return f"{found['ratio_to_floor']:.2f} ({_ms(found['median_ms'])} ms)"


def shown_cases(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One case per shape: SUMMARY_TOKENS tokens where they were run, or else the most."""
    cases = [case for case in record["cases"] if case.get("modes")]
    chosen: dict[tuple[int, int], dict[str, Any]] = {}
    for case in cases:
        key = case["hidden"], case["vocab"]
        if key not in chosen or _rank(case) > _rank(chosen[key]):
            chosen[key] = case
    return list(chosen.values())


def _rank(case: dict[str, Any]) -> tuple[bool, int]:
    return case["tokens"] == SUMMARY_TOKENS, case["tokens"]
