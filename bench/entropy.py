"""Does the controller hold the entropy? GRPO and two AEPO settings, over targets and seeds."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.environment import RESULTS, ROOT, command_line, describe, device_name

TARGETS = (0.5, 1.0)

# The published setting (arXiv 2510.08141 v7), and the one that held entropy best here.
SETTINGS: dict[str, tuple[str, ...]] = {
    "grpo": ("aepo.enabled=false",),
    "published": (
        'aepo.form="resample"',
        "aepo.alpha=0.015625",
        "aepo.gain=1.0",
        "aepo.temperature_min=0.8",
        "aepo.temperature_max=1.2",
    ),
    "best": (
        'aepo.form="one_pass"',
        "aepo.baseline=true",
        "aepo.alpha=4.0",
        "aepo.gain=1.0",
        "aepo.integral_gain=0.05",
        "aepo.ramp_steps=15",
        "aepo.temperature_min=0.7",
        "aepo.temperature_max=3.0",
    ),
}


@dataclass(frozen=True)
class Run:
    """One training run: a setting, a target (None where it has none) and a seed."""

    setting: str
    target: float | None
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        target = "" if self.target is None else f"-h{self.target:g}"
        return f"{self.setting}{target}-s{self.seed}"


def add_command(commands: Any) -> None:
    """Add `entropy` to the benchmark's commands."""
    parser = commands.add_parser("entropy", help=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-entropy"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Run what has not been run yet, then write the result and its figure."""
    # Here, so that the other benchmarks run where matplotlib is missing.
    from bench.entropy_figure import draw

    runs = [
        Run(setting, target, seed)
        for seed in range(arguments.seeds)
        for setting in arguments.settings
        for target in ([None] if setting == "grpo" else arguments.targets)
    ]
    changes = [*arguments.set, f"trainer.steps={arguments.steps}"]
    train_all(runs, arguments.runs, changes, arguments.jobs)
    results = [result_of(run, arguments.runs / run.name) for run in runs]
    record = {
        "benchmark": "entropy",
        "environment": describe(),
        "command": command_line(),
        "config": _config(arguments.runs / runs[0].name),
        "settings": {name: list(SETTINGS[name]) for name in arguments.settings},
        "runs": results,
    }
    folder = RESULTS / device_name()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"entropy-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(record, indent=1))
    print(table(results))
    print(f"result: {path}\nfigure: {draw(record, path.with_suffix('.png'))}")


def _config(folder: Path) -> str:
    text = (folder / "config.toml").read_text()
    return re.sub("^output_dir = .*\n+", "", text, flags=re.MULTILINE)


def train_all(runs: list[Run], folder: Path, changes: list[str], jobs: int) -> None:
    """Train `jobs` runs at a time; a finished run is kept, an unfinished one goes on."""
    waiting, running = list(runs), []
    while waiting or running:
        while waiting and len(running) < jobs:
            run = waiting.pop(0)
            running.append((run, _start(run, folder / run.name, changes)))
            print(f"{time.strftime('%H:%M:%S')} started {run.name}", flush=True)
        for run, process in list(running):
            if process.poll() is None:
                continue
            running.remove((run, process))
            if process.returncode:
                log = folder / run.name / "output.log"
                raise SystemExit(f"{run.name} failed with {process.returncode}; see {log}")
            print(f"{time.strftime('%H:%M:%S')} finished {run.name}", flush=True)
        time.sleep(0.5)


def _start(run: Run, folder: Path, changes: list[str]) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    began, commit = folder / "commit", str(describe()["commit"])
    if began.exists() and began.read_text() != commit:
        raise SystemExit(f"{folder} was begun at commit {began.read_text()}, and this is {commit}")
    began.write_text(commit)
    settings = [f"trainer.seed={run.seed}", f"output_dir={folder}", *SETTINGS[run.setting]]
    if run.target is not None:
        settings.append(f"aepo.entropy_target={run.target}")
    command = [sys.executable, "-m", "aepo_fast", "train", str(ROOT / "bench" / "entropy.toml")]
    for change in [*settings, *changes]:
        command += ["--set", change]
    # One thread a run: two runs then share two cores without waiting for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "output.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--resume"], stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def result_of(run: Run, folder: Path) -> dict[str, Any]:
    """The series of a finished run and what the benchmark asks of it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "entropy" in line]
    late = steps[len(steps) // 2 :]
    evals = [line for line in lines if "eval/avg@k" in line]
    result: dict[str, Any] = {
        "setting": run.setting,
        "target": run.target,
        "seed": run.seed,
        "entropy": [round(line["entropy"], 4) for line in steps],
        "temperature": [round(line["aepo/temperature"], 4) for line in steps],
        "reward": [round(line["reward"], 4) for line in steps],
        "mean_length": [round(line["completions/mean_length"], 2) for line in steps],
        "positive_fraction": [round(line["aepo/positive_fraction"], 4) for line in steps],
        "step_s": [round(line["time/step"], 2) for line in steps],
        "heldout": [[line["step"], line["eval/avg@k"]] for line in evals],
        "late_entropy": statistics.fmean(line["entropy"] for line in late),
        "late_heldout": evals[-1]["eval/avg@k"],
    }
    if run.target is not None:
        errors = [abs(line["entropy"] - run.target) / run.target for line in late]
        result["late_error"] = statistics.fmean(errors)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Means over seeds, as a Markdown table; spreads are min to max."""
    rows = [
        "| setting | H0 | entropy, last half | mean of abs(H - H0) / H0 | held-out accuracy |",
        "|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((r["setting"], r["target"]) for r in results):
        group = [r for r in results if (r["setting"], r["target"]) == key]
        error = _spread([r["late_error"] for r in group], percent=True) if key[1] else "-"
        rows.append(
            f"| {key[0]} | {key[1] or '-'} | {_spread([r['late_entropy'] for r in group])} "
            f"| {error} | {_spread([r['late_heldout'] for r in group])} |"
        )
    return "\n".join(rows)


def _spread(values: list[float], *, percent: bool = False) -> str:
    form = "{:.0%}" if percent else "{:.2f}"
    mean, low, high = statistics.fmean(values), min(values), max(values)
    if len(values) == 1:
        return form.format(mean)
    return f"{form.format(mean)} ({form.format(low)} to {form.format(high)})"
