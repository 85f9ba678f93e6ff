"""A process that fails, hangs or is killed ends all of them, and torchrun's next start goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from aepo_fast.config.toml import dump_config
from aepo_fast.training.run import train
from bench.common.environment import ROOT
from tests.aepo_fast.world.runs import lines_of, run_config, weights_of, with_output


def test_a_run_outlives_its_ranks(tiny_model_dir: Path, tmp_path: Path) -> None:
    changes = {"checkpoint": {"every": 1}, "trainer": {"steps": 5, "timeout_s": 10.0}}
    cfg = run_config(tiny_model_dir, tmp_path / "run", changes)
    (tmp_path / "run.toml").write_text(dump_config(cfg))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "3", "--shutdown-timeout", "2"]
    command += ["-m", "tests.rank_faults", "train", str(tmp_path / "run.toml"), "--resume"]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", *sys.path)))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    log = tmp_path / "log"
    with log.open("w") as file:
        done = subprocess.run(command, env=env, cwd=ROOT, stdout=file, stderr=file, timeout=400)
    said = log.read_text()
    assert done.returncode == 0, said[-3000:]
    logged = "rank 1 failed alone: while training, in step 2: ValueError: a fault of one rank"
    assert f"error: {logged}" in said and f"error: rank 0 stops: {logged}" in said
    phase = "training, in step 3, log-probs before the updates"
    assert f"timeout_s = 10 s while {phase}. Where each is: " in said
    assert f"rank 1 {phase}, at _hangs (rank_faults.py:" in said
    assert "error: rank 1 has lost another rank, which was killed" in said
    one = with_output(cfg, tmp_path / "one")
    assert train(one) == 0
    assert [line["step"] for line in lines_of(cfg)] == [1, 2, 3, 4, 5]
    ours, theirs = weights_of(one), weights_of(cfg)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=name)
