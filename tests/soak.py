"""Runs under strain: killed at random moments, and watched for growth over a long time.

`make soak` does both in full, 50 kills and two hours; the suite does both in short.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aepo_fast.config.sections import CheckpointConfig, Config, EvalConfig
from aepo_fast.training.checkpoint import complete_checkpoints
from aepo_fast.training.run import train
from tests.processes import processes_of
from tests.tiny_model import build_tiny_model
from tests.tiny_run import tiny_config, with_trainer

STEPS = 12  # of the run that is killed
# All that a run leaves in its folder.
LEFT = {"checkpoints", "config.toml", "metrics.jsonl", "rollouts.jsonl"}
WORKERS_END_S = 10.0  # within this time after their run has been killed
GROWTH_MIB = 16.0
# Before growth is watched: until step 35 a run grows from 450 to 494 MiB, then by 1 in 400 steps.
WARM_STEPS = 40


@dataclass(frozen=True)
class Usage:
    """What a process held at one moment: resident memory in MiB, handles, files of its run."""

    memory: float
    handles: int
    files: int


class Runs:
    """Starts runs as processes, from a server that has imported what they need."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        temporary.mkdir()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["aepo_fast.training.run", "tests.tiny_run"])
        warm_up = self._context.Process(target=_nothing)
        warm_up.start()
        warm_up.join()

    def start(self, cfg: Config) -> Any:
        """A process that trains or goes on, in a session of its own."""
        process = self._context.Process(target=_run, args=(cfg, self.temporary))
        process.start()
        return process

    @contextmanager
    def ended(self, process: Any) -> Iterator[None]:
        """Wait for a process, and for all it has started: raises where one stays."""
        process.join()
        yield
        until = time.monotonic() + WORKERS_END_S
        while left := processes_of("session", process.pid):
            assert time.monotonic() < until, f"processes {left} outlive their run"
            time.sleep(0.02)


def _nothing() -> None:
    pass


def _run(cfg: Config, temporary: Path) -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    torch.set_num_threads(1)
    if code := train(cfg, resume=True):
        raise SystemExit(code)


def kill_at_random(model: Path, folder: Path, *, kills: int, seed: int = 0) -> list[float]:
    """Kill a run `kills` times and let it end; returns the moments, in seconds after its start.

    Asserts that it ends as an undisturbed one: the same weights, every step logged once, and no
    process, temporary file or lock left behind.
    """
    straight = with_trainer(tiny_config(model, folder / "straight"), steps=STEPS)
    killed = replace(straight, output_dir=str(folder / "killed"))
    runs, moments = Runs(folder / "tmp"), random.Random(seed)
    begun = time.monotonic()
    process = runs.start(straight)
    with runs.ended(process):
        whole = time.monotonic() - begun
        assert process.exitcode == 0
    when: list[float] = []
    while len(when) < kills:
        process = runs.start(killed)
        moment = moments.uniform(0, 0.6) * whole
        process.join(moment)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            with runs.ended(process):
                when.append(moment)
            continue
        assert process.exitcode == 0
        # It got to the end before the kill: begin the last stretch again.
        _forget_after(killed, moments.randrange(1, STEPS - 3))
    process = runs.start(killed)
    with runs.ended(process):
        assert process.exitcode == 0
    _check_same_end(straight, killed)
    assert set(os.listdir(killed.output_dir)) == LEFT
    assert _checkpoints(killed) == _checkpoints(straight)
    assert os.listdir(runs.temporary) == []
    return when


def _checkpoints(cfg: Config) -> list[str]:
    return sorted(os.listdir(Path(cfg.output_dir) / "checkpoints"))


def _forget_after(cfg: Config, step: int) -> None:
    """Leave a run as a kill during step + 1 would have left it."""
    for path in complete_checkpoints(Path(cfg.output_dir) / "checkpoints"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)


def _check_same_end(one: Config, other: Config) -> None:
    for name in ("model.safetensors", "optimizer.pt"):
        paths = [complete_checkpoints(Path(c.output_dir) / "checkpoints")[-1] for c in (one, other)]
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes(), name
    assert _logged(one) == _logged(other)
    assert [line["step"] for line in _logged(other)] == list(range(1, STEPS + 1))
    texts = [(Path(c.output_dir) / "rollouts.jsonl").read_bytes() for c in (one, other)]
    assert texts[0] == texts[1]


def _logged(cfg: Config) -> list[dict[str, Any]]:
    """The log without what differs between two runs of the same thing."""
    lines = (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(_VARYING)}
        for line in lines
    ]


_VARYING = ("time/", "perf/", "memory/")


def watch_growth(model: Path, folder: Path, *, seconds: float) -> tuple[Usage, Usage, int]:
    """Let a tiny run go on for a time; what it held after a third of it and at its end, and steps.

    Asserts that neither handles nor files grow, and memory by no more than GROWTH_MIB.
    """
    cfg = with_trainer(tiny_config(model, folder / "long"), steps=10**9)
    cfg = replace(
        cfg, checkpoint=CheckpointConfig(every=5, keep=2), eval=EvalConfig(every=7, prompts=2)
    )
    runs = Runs(folder / "tmp")
    process = runs.start(cfg)
    log = Path(cfg.output_dir) / "metrics.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") > WARM_STEPS):
        assert process.exitcode is None
        time.sleep(0.1)
    used: list[Usage] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        used.append(_usage(process.pid, cfg, runs.temporary))
        time.sleep(seconds / 100)
    os.kill(process.pid, signal.SIGTERM)
    with runs.ended(process):
        assert process.exitcode == 128 + signal.SIGTERM
    third = len(used) // 3
    early, late = _typical(used[third : 2 * third]), _typical(used[-third:])
    assert late.handles <= early.handles and late.files <= early.files, (early, late)
    assert late.memory - early.memory <= GROWTH_MIB, (early, late)
    return early, late, log.read_bytes().count(b"\n")


def _typical(used: list[Usage]) -> Usage:
    """The medians: at single moments a checkpoint is being written."""
    columns = zip(*((one.memory, one.handles, one.files) for one in used), strict=True)
    memory, handles, files = map(statistics.median_low, columns)
    return Usage(memory, int(handles), int(files))


def _usage(pid: int, cfg: Config, temporary: Path) -> Usage:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    files = sum(len(names) for root in (cfg.output_dir, temporary) for *_, names in os.walk(root))
    return Usage(memory, len(os.listdir(f"/proc/{pid}/fd")), files)


def main() -> None:
    """Do both and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=7200.0, help="of the long run")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_tiny_model(folder / "model", given.seed)
        (folder / "killed").mkdir()
        moments = kill_at_random(model, folder / "killed", kills=given.kills, seed=given.seed)
        spread = f"{min(moments):.2f} to {max(moments):.2f} s after a start" if moments else "none"
        print(f"{len(moments)} kills, {spread}: ends as an undisturbed run, nothing left behind")
        (folder / "watched").mkdir()
        early, late, steps = watch_growth(model, folder / "watched", seconds=given.seconds)
        print(f"{given.seconds:.0f} s, {steps} lines logged: {early} then {late}")


if __name__ == "__main__":
    main()
