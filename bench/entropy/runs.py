"""Trains, evaluates and records the runs that have no part yet, some at a time."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.common.environment import ROOT, device_name
from bench.entropy.settings import BASE, PASS_SAMPLES, SIZES, Run

# What a run's outcome depends on besides its settings. Docs and benchmarks change without it.
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
METHOD_FILES = ("aepo_fast/**/*.py", "kernels/aepo_kernels/**/*.py")


def method_hash(root: Path = ROOT) -> str:
    """SHA-256 of what METHOD_FILES do, in the order of their paths: of their syntax trees.

    Comments, docstrings and layout may change without it.
    """
    paths = {path for pattern in METHOD_FILES for path in root.glob(pattern)}
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def part_path(run: Run, results: Path) -> Path:
    """Where a finished run's part lies."""
    folder = results / device_name() / "entropy" / run.size
    return folder / f"{run.task}-{run.name}.json"


def plan_of(run: Run, changes: list[str], base: str) -> dict[str, Any]:
    """All that a run is made from, but for where its files lie.

    base: name of the base model; a package's, or one that says what it was made with.
    """
    size = SIZES[run.size]
    if run.setting == BASE:  # which no training changes
        changes = [change for change in changes if change.startswith(("data.", "rollout."))]
    return {
        **asdict(run),
        "settings": [*run.overrides(), *changes],
        "config": size.config.read_text(),
        "base": base,
        "samples": PASS_SAMPLES,
        "method": method_hash(),
    }


def is_done(plan: dict[str, Any], part: Path, *, redo: bool) -> bool:
    """Whether a part has what a plan asks for; one of anything else ends the benchmark.

    redo: it is done again instead.
    """
    if not part.exists():
        return False
    found = json.loads(part.read_text())
    differs = [key for key in plan if found.get(key) != plan[key]]
    if differs and not redo:
        raise SystemExit(f"{part} {_difference(differs)}; give --redo to replace it")
    return not differs


def _difference(differs: list[str]) -> str:
    if "method" in differs:
        return "is of other sources of the trainer or kernels (another method hash)"
    return f"has other {' and '.join(differs)} than this run"


def prepare(plan: dict[str, Any], folder: Path, *, redo: bool) -> None:
    """A run's folder with its plan; one that was begun with another plan is refused or deleted."""
    path = folder / "plan.json"
    if path.exists():
        begun = json.loads(path.read_text())
        differs = [key for key in plan if begun.get(key) != plan[key]]
        if differs and not redo:
            raise SystemExit(f"{folder}, unfinished, {_difference(differs)}; give --redo")
        if differs:
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan, indent=1))


@dataclass(frozen=True)
class Job:
    """A run to do: its plan, where it works, where its part goes, and overrides of local paths."""

    plan: dict[str, Any]
    folder: Path
    part: Path
    local: list[str]


def run_all(work: list[Job], jobs: int, *, redo: bool) -> None:
    """Do `jobs` runs at a time; those that have their part are done."""
    waiting = [job for job in work if not is_done(job.plan, job.part, redo=redo)]
    for job in waiting:
        prepare(job.plan, job.folder, redo=redo)
    print(f"{len(work) - len(waiting)} runs are done, {len(waiting)} to do", flush=True)
    # The runs are told, too: they save what they have, and go on next time.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    running: list[tuple[Job, subprocess.Popen[bytes]]] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                job = waiting.pop(0)
                running.append((job, _start(job)))
                print(f"{time.strftime('%H:%M:%S')} started {job.folder.name}", flush=True)
            for job, process in list(running):
                if process.poll() is None:
                    continue
                running.remove((job, process))
                if process.returncode:
                    log = job.folder / "output.log"
                    raise SystemExit(f"{job.folder.name} failed: {process.returncode}, see {log}")
                print(f"{time.strftime('%H:%M:%S')} finished {job.folder.name}", flush=True)
            time.sleep(0.2)
    finally:
        for _, process in running:
            process.terminate()
            process.wait()
        signal.signal(signal.SIGTERM, before)


def _start(job: Job) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bench.entropy.child", str(job.folder), str(job.part)]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    # One thread a run: two runs then share two cores without waiting for each other.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    with (job.folder / "output.log").open("ab") as log:
        return subprocess.Popen(
            [*command, *job.local], stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )
