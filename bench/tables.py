"""Writes the tables of the README and docs from committed results: `python -m bench tables`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.common.environment import RESULTS, ROOT
from bench.e2e.table import table as e2e_table
from bench.entropy import report
from bench.entropy.measures import grouped
from bench.entropy.settings import SIZES
from bench.kernels import table as kernel_table
from bench.memory.run import table as memory_table
from bench.step.run import table as step_table

_OURS, _BESIDE = "ours (chunked)", ("TRL chunked", "torch.compile")
# Page -> how its links lead to the root.
PAGES = {
    ROOT / "README.md": "",
    ROOT / "docs" / "benchmarks.md": "../",
    ROOT / "docs" / "memory.md": "../",
    ROOT / "docs" / "many-devices.md": "../",
}


def add_command(commands: Any) -> None:
    """Add `tables` to the benchmark's commands."""
    parser = commands.add_parser("tables", help=__doc__)
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Write the generated blocks of all pages, and figures that are missing beside a result."""
    from bench.kernels.figure import draw

    for path in RESULTS.glob("*/kernels-*.json"):
        if not path.with_suffix(".png").exists():
            draw(json.loads(path.read_text()), path.with_suffix(".png"))
    for page, to_root in PAGES.items():
        page.write_text(render(page.read_text(), to_root))


def render(page: str, to_root: str = "") -> str:
    """A page with its generated blocks made anew; a block without results stays empty."""
    blocks = {
        "first-light": first_light,
        "entropy": entropy,
        "headline": headline,
        "kernels-gpu": lambda: kernels(on_cpu=False),
        "kernels-cpu": lambda: kernels(on_cpu=True),
        "tokens-cpu": tokens_on_cpu,
        "step-gpu": lambda: step(on_cpu=False),
        "step-cpu": lambda: step(on_cpu=True),
        "e2e-gpu": lambda: e2e(on_cpu=False),
        "e2e-cpu": lambda: e2e(on_cpu=True),
        "memory-gpu": lambda: memory(on_cpu=False),
        "memory-cpu": lambda: memory(on_cpu=True),
        "memory-ranks": lambda: memory(on_cpu=True, name="memory-ranks"),
    }
    return re.sub(
        r"(<!-- ([\w-]+) -->\n).*?(<!-- /\2 -->)",
        lambda match: match[1] + blocks[match[2]]().replace("](", f"]({to_root}") + match[3],
        page,
        flags=re.S,
    )


def newest(pattern: str) -> Path | None:
    """The newest result of a kind, by the date in its name."""
    found = sorted(RESULTS.glob(pattern), key=lambda path: path.name)
    return found[-1] if found else None


def first_light() -> str:
    """What a run of the shipped first config did, from its metrics."""
    path = newest("*/first-light-2*.jsonl")  # those with a sampler in the name are beside it
    if path is None:
        return ""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [
        "| step | held-out accuracy (95%) | entropy | T | mean length |",
        "|---|---|---|---|---|",
    ]
    for line in lines:
        if "eval/avg@k" not in line:
            continue
        low, high = line["eval/ci95_low"], line["eval/ci95_high"]
        accuracy = f"{line['eval/avg@k']:.2f} ({low:.2f} to {high:.2f})"
        entropy, temperature = line.get("entropy"), line.get("aepo/temperature")
        rows.append(
            f"| {line['step']} | {accuracy} | {'-' if entropy is None else f'{entropy:.2f}'} "
            f"| {'-' if temperature is None else f'{temperature:.2f}'} "
            f"| {line['eval/mean_length']:.1f} |"
        )
    note = f"[Raw metrics]({_link(path)})."
    return "\n".join(rows) + f"\n\n{note}\n"


_ENTROPY_ROWS = ("base", "grpo", "published", "lift")
_ENTROPY_FIGURES = ("write-entropy", "write-accuracy")


def entropy() -> str:
    """The entropy benchmark's first rows and two figures.

    All rows and figures lie in its folder.
    """
    blocks = []
    for size in SIZES:
        for folder in report.folders(size, RESULTS):
            parts = report.load(folder)
            for name, task in grouped(parts, lambda part: part["task"]).items():
                title = f"**{size}, {name}**: {report.note(task)}"
                first = [part for part in task if part["setting"] in _ENTROPY_ROWS]
                link = f"[all settings]({_link(folder / 'tables.md')})"
                blocks.append(f"{title} ({link}).\n\n{report.table(first)}\n")
            figures = [folder / f"{name}.png" for name in _ENTROPY_FIGURES]
            blocks += [f"![{path.stem}]({_link(path)})\n" for path in figures if path.exists()]
    return "\n".join(blocks)


def headline() -> str:
    """Training with the head on the newest GPU, beside those that compute the same."""
    for path, record, device in _kernel_results(on_cpu=False):
        settings = record["settings"]
        note = (
            f"{device}, {settings['dtype']}: time over the bare GEMMs' in the same run, medians of "
            f"{settings['rounds']} interleaved rounds ([raw]({_link(path)}))."
        )
        return f"{kernel_table.headline(record)}\n{note}\n"
    return ""


def _kernel_results(*, on_cpu: bool) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """The runs of the most shapes that timed others beside ours, see `_newest_by_device`."""
    return _newest_by_device(
        "*/kernels-*.json",
        kernel_table.compares,
        lambda record: len(kernel_table.shown_cases(record)),
        on_cpu=on_cpu,
    )


def kernels(*, on_cpu: bool) -> str:
    """The widest kernel benchmark of each device and dtype: summary and what was left out.

    That of the most shapes, the newest of those. One that timed nothing beside ours says too little
    for a table.
    The figure is that of the newest of each GPU and of all CPUs.
    """
    parts, drawn = [], set()
    for path, record, device in _kernel_results(on_cpu=on_cpu):
        where, settings = record["environment"], record["settings"]
        versions = f"torch {where['torch']}, triton {where['triton']}{_peers(record)}"
        parts.append(
            f"**{device}, {settings['dtype']}**, commit {where['commit'][:7]}, {versions}: time "
            f"over the bare GEMMs' in the same run, medians of {settings['rounds']} interleaved "
            f"rounds ([raw]({_link(path)})).\n"
        )
        parts.append(kernel_table.summary(record))
        if record["unavailable"]:
            names = "; ".join(f"{name} ({why})" for name, why in record["unavailable"].items())
            parts.append(f"Not available there: {names}.\n")
        figure = path.with_suffix(".png")
        if figure.exists() and path.parent not in drawn:
            drawn.add(path.parent)
            parts.append(f"![time over the bare GEMMs']({_link(figure)})\n")
    return "\n".join(parts)


def _peers(record: dict[str, Any]) -> str:
    """The peers' versions, as the end of a list."""
    found = {name.split()[0]: version for name, version in record["versions"].items() if version}
    own = ("ours", "torch", "torch.compile")
    return "".join(f", {name} {version}" for name, version in found.items() if name not in own)


def tokens_on_cpu() -> str:
    """Training by number of tokens and shape on each CPU in bfloat16.

    Of each the newest run that timed others beside ours, if there is one.
    """
    shapes: dict[str, None] = {}
    cells: dict[str, dict[tuple[int, str], list[str]]] = {}  # device -> (tokens, shape) -> texts
    for path, record in _by_date("cpu/kernels-*.json"):
        device = _device(record)
        if device is None or record["settings"]["dtype"] != "bfloat16":
            continue
        for case in record["cases"]:
            found = case.get("modes", {}).get("training", {}).get("candidates", {})
            ours, *others = [_time_and_memory(found.get(name)) for name in (_OURS, *_BESIDE)]
            if ours is None:
                continue
            shape = f"H {case['hidden']}, V {case['vocab']}"
            shapes[shape] = None
            texts = [f"**[{ours}]({_link(path)})**"]
            texts += [f"{name} {text}" for name, text in zip(_BESIDE, others, strict=True) if text]
            before = cells.setdefault(device, {}).get((case["tokens"], shape), [])
            if len(texts) > 1 or len(before) <= 1:
                cells[device][case["tokens"], shape] = texts
    parts = []
    for device, found in reversed(cells.items()):
        rows = [f"| N | {' | '.join(shapes)} |", "|---|" + "---|" * len(shapes)]
        for tokens in sorted({tokens for tokens, _ in found}):
            each = ["; ".join(found.get((tokens, shape), ["-"])) for shape in shapes]
            rows.append(f"| {tokens:,} | {' | '.join(each)} |")
        parts.append("\n".join([f"**{device}**", "", *rows, ""]))
    return "\n".join(parts)


def _time_and_memory(found: dict[str, Any] | None) -> str | None:
    if found is None or found["status"] != "ok" or found["peak_extra_bytes"] is None:
        return None
    return f"{found['ratio_to_floor']:.2f}, {found['peak_extra_bytes'] / 2**20:,.0f} MiB"


def step(*, on_cpu: bool) -> str:
    """The newest benchmark of a whole training step on each device."""
    parts = []
    for path, record, device in _newest_by_device("*/step-*.json", on_cpu=on_cpu):
        where, settings = record["environment"], record["settings"]
        parts.append(
            f"{device}, torch {where['torch']}, {settings['model']}: {settings['prompts']} prompts "
            f"of {settings['prompt_tokens']} tokens, {settings['samples']} samples each of 4 to "
            f"{settings['tokens']}, medians of {settings['rounds']} interleaved rounds "
            f"([raw]({_link(path)})).\n"
        )
        parts.append(step_table(record["candidates"]) + "\n")
    return "\n".join(parts)


def e2e(*, on_cpu: bool) -> str:
    """The newest comparison of whole runs on each device."""
    parts = []
    for path, record, device in _newest_by_device("*/e2e-*.json", on_cpu=on_cpu):
        where, settings = record["environment"], record["settings"]
        runs = record["candidates"].values()
        version = next(
            (one["with"]["version"] for one in runs if "version" in one.get("with", {})), "none"
        )
        accuracy = record["base"].get("accuracy")
        before = "" if accuracy is None else f", accuracy {accuracy:.2f} before"
        parts.append(
            f"{device}, torch {where['torch']}, TRL {version}, {settings['model']} on "
            f"{settings['task']}: {settings['steps']} steps of {settings['prompts']} prompts, "
            f"{settings['samples']} samples each of at most {settings['tokens']} tokens, medians "
            f"of all steps but the first{before} ([raw]({_link(path)})).\n"
        )
        parts.append(e2e_table(record["candidates"]) + "\n")
    return "\n".join(parts)


def memory(*, on_cpu: bool, name: str = "memory") -> str:
    """The newest comparison of plans with runs, on a CPU or a GPU.

    name: of its files; "memory-ranks" for runs of several processes.
    """
    found = sorted(RESULTS.glob(f"*/{name}-2*.json"), key=lambda path: path.name)
    found = [path for path in found if (path.parent.name == "cpu") == on_cpu]
    if not found:
        return ""
    record = json.loads(found[-1].read_text())
    where = record["environment"]
    device = where["cpu"] if on_cpu else where["device"]
    ranks = record["settings"].get("ranks", 1)
    each = f" of {ranks} processes" if ranks > 1 else ""
    ratios = [one["ratio"] for one in record["cases"] if one["status"] == "ok"]
    head = (
        f"{device}, torch {where['torch']}, {len(ratios)} runs{each}: predicted over measured "
        f"{min(ratios):.3f} to {max(ratios):.3f} ([raw]({_link(found[-1])})).\n"
    )
    return f"{head}\n{memory_table(record['cases'])}\n"


def _newest_by_device(
    pattern: str,
    wanted: Callable[[dict[str, Any]], bool] = bool,
    width: Callable[[dict[str, Any]], int] = lambda record: 0,
    *,
    on_cpu: bool,
) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """The newest of the widest results of a kind on each device in each dtype.

    Each with its record and device, the newest first.
    """
    latest: dict[tuple[str, str], tuple[Path, dict[str, Any], str]] = {}
    for path, record in _by_date(pattern):
        device = _device(record)
        right = (path.parent.name == "cpu") == on_cpu
        if device is None or not right or not wanted(record):
            continue
        key = device, record["settings"].get("dtype", "")
        if key in latest and width(latest[key][1]) > width(record):
            continue
        latest.pop(key, None)  # newest last
        latest[key] = path, record, device
    yield from reversed(latest.values())


def _by_date(pattern: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Results of a kind with their records, the newest last."""
    for path in sorted(RESULTS.glob(pattern), key=lambda path: path.name):
        yield path, json.loads(path.read_text())


def _device(record: dict[str, Any]) -> str | None:
    """A GPU's name; a CPU's with the rows that ran, since models of one name differ.

    None for a CPU's result of before there were rows in C++.
    """
    where = record["environment"]
    rows = record.get("row_kernels") or where.get("row_kernels")
    if where["device"] == "cpu":
        return f"{where['cpu']}, rows {rows}" if rows else None
    return where["device"]


def _link(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
