"""A run of several processes, of which one is killed at random moments: it ends as if undisturbed.

python -m tests.rank_kills --kills 10
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from aepo_fast.config.sections import CheckpointConfig, Config
from aepo_fast.config.toml import dump_config
from aepo_fast.training.checkpoint import complete_checkpoints
from bench.common.environment import ROOT
from tests.processes import processes_of
from tests.tiny_model import build_tiny_model
from tests.tiny_run import tiny_config, with_trainer

STEPS = 12
_MARK = "AEPO_FAST_RANK_KILLS"  # a variable that all processes of one run have
_VARYING = ("time/", "perf/", "memory/")


def start(cfg: Config, ranks: int, log: Path, mark: str) -> subprocess.Popen[bytes]:
    """torchrun, which trains or goes on."""
    config = Path(cfg.output_dir + ".toml")
    config.write_text(dump_config(cfg))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "--max-restarts", "20"]
    command += ["-m", "aepo_fast", "train", str(config), "--resume"]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", *sys.path)))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, _MARK: mark}
    with log.open("a") as file:
        return subprocess.Popen(command, env=env, cwd=ROOT, stdout=file, stderr=file)


def marked(mark: str) -> list[int]:
    """The living processes of a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{_MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def kill_ranks(folder: Path, *, kills: int, ranks: int, seed: int) -> list[tuple[int, float]]:
    """Kill a random rank `kills` times; returns which and when, in seconds after its start.

    Asserts that the run ends with the weights of an undisturbed one, has logged every step once,
    and leaves no process, lock or unfinished checkpoint behind.
    """
    model = build_tiny_model(folder / "model")
    cfg = with_trainer(tiny_config(model, folder / "straight"), steps=STEPS, timeout_s=120.0)
    straight = replace(cfg, checkpoint=CheckpointConfig(every=1, keep=3))
    killed = replace(straight, output_dir=str(folder / "killed"))
    mark = uuid.uuid4().hex
    agent = start(straight, ranks, folder / "straight.log", mark)
    whole = _seconds(lambda: agent.poll() is not None or _logs(straight) > 0)
    trains = _seconds(lambda: agent.poll() is not None)
    assert agent.returncode == 0
    chance, done = random.Random(seed), list[tuple[int, float]]()
    agent = start(killed, ranks, folder / "killed.log", mark)
    while True:
        before, since, logged = processes_of("parent", agent.pid), time.monotonic(), _logs(killed)
        in_training = chance.random() < 0.75  # the others while ranks start
        moment = chance.uniform(0, trains if in_training else whole)
        if len(done) == kills:
            moment = float("inf")
        elif in_training:
            _seconds(partial(_begins, agent, killed, logged))
            since = time.monotonic()
        while agent.poll() is None and time.monotonic() - since < moment:
            time.sleep(0.02)
        if agent.poll() is not None:
            assert agent.returncode == 0, (folder / "killed.log").read_text()[-5000:]
            if len(done) == kills:
                break
            # It came to its end before the kill: begin its last stretch again.
            forget_after(killed, chance.randrange(1, STEPS - 3))
            agent = start(killed, ranks, folder / "killed.log", mark)
            continue
        living = processes_of("parent", agent.pid)
        if len(living) < ranks:
            continue
        rank = chance.randrange(ranks)
        os.kill(living[rank], signal.SIGKILL)
        done.append((rank, moment))
        what = "of steps" if in_training else "of its start"
        where = f"rank {rank} after {moment:.1f} s {what}, {_last_step(killed)}"
        print(f"kill {len(done)}: {where}", flush=True)
        while agent.poll() is None and set(processes_of("parent", agent.pid)) & {*before, *living}:
            time.sleep(0.05)  # until torchrun has ended the others, too
    _check_same_end(straight, killed)
    time.sleep(2)
    assert not marked(mark), marked(mark)
    return done


def _seconds(done: Callable[[], bool]) -> float:
    """How long it takes until `done`."""
    begun = time.monotonic()
    while not done():
        time.sleep(0.02)
    return time.monotonic() - begun


def _begins(agent: subprocess.Popen[bytes], cfg: Config, logged: float) -> bool:
    """Whether a run has logged anything since, or has ended."""
    return agent.poll() is not None or _logs(cfg) != logged


def _logs(cfg: Config) -> float:
    """When a run last wrote its log, 0 where it has none."""
    path = Path(cfg.output_dir) / "metrics.jsonl"
    return path.stat().st_mtime if path.exists() else 0.0


def forget_after(cfg: Config, step: int) -> None:
    """Leave a run as a kill during step + 1 would have left it."""
    for path in complete_checkpoints(Path(cfg.output_dir) / "checkpoints")[:-1]:
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    shutil.rmtree(complete_checkpoints(Path(cfg.output_dir) / "checkpoints")[-1])


def _last_step(cfg: Config) -> str:
    found = complete_checkpoints(Path(cfg.output_dir) / "checkpoints")
    return found[-1].name if found else "no step saved"


def _check_same_end(one: Config, other: Config) -> None:
    last = Path("checkpoints") / f"step_{STEPS}" / "model.safetensors"
    folders = [Path(cfg.output_dir) for cfg in (one, other)]
    assert (folders[0] / last).read_bytes() == (folders[1] / last).read_bytes()
    logged = [_logged(folder) for folder in folders]
    assert [line["step"] for line in logged[1]] == list(range(1, STEPS + 1))
    assert logged[0] == logged[1]
    texts = [(folder / "rollouts.jsonl").read_bytes() for folder in folders]
    assert texts[0] == texts[1]
    assert sorted(os.listdir(folders[0])) == sorted(os.listdir(folders[1]))
    assert not list(folders[1].rglob("*.tmp"))


def _logged(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith(_VARYING)} for line in lines]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    place = given.folder or Path(tempfile.mkdtemp(prefix="rank-kills-"))
    place.mkdir(exist_ok=True)
    options = {"kills": given.kills, "ranks": given.ranks, "seed": given.seed}
    print(f"{len(kill_ranks(place, **options))} kills: the same weights, every step logged once")
    if given.folder is None:
        shutil.rmtree(place)
