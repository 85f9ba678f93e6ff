"""A process that fails, hangs or is killed ends all of them, and torchrun's next start goes on."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from aepo_fast.cli.doctor_ranks import report_ranks
from aepo_fast.config.sections import Config, RewardConfig
from aepo_fast.config.toml import dump_config
from aepo_fast.report.unexpected import SAID
from aepo_fast.training import rank_agreement, run
from aepo_fast.training.run import train
from aepo_fast.training.trainer import Trainer
from aepo_fast.world import join, part
from bench.common.environment import ROOT
from tests.aepo_fast.world.ranks import run_ranks
from tests.aepo_fast.world.runs import lines_of, run_config, weights_of, with_output


@pytest.mark.soak
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


def no_space(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def end_each(cfg: Config, broken: Config, full: Config) -> dict[str, Any]:
    """What each of two ranks sees of runs that rank 1 alone has a reason to end."""
    torch.set_num_threads(1)
    world = join(on_gpu=False, timeout_s=120)
    is_odd = world.rank == 1
    step, load, version = Trainer.step, run.load_inputs, rank_agreement.__version__

    def with_signal(trainer: Trainer, on_tokens: Callable[[int], None]) -> Any:
        if trainer.steps_done == 2 and is_odd:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, on_tokens)

    def with_fewer_prompts(*args: Any, **options: Any) -> Any:
        inputs = load(*args, **options)
        fewer = replace(inputs.prompts, train=inputs.prompts.train[:-1])
        return replace(inputs, prompts=fewer)

    def seen(cfg: Config) -> tuple[str, bool]:
        try:
            return str(train(cfg)), True
        except Exception as error:
            said = SAID not in getattr(error, "__notes__", ())
            return f"{type(error).__name__}: {error}", said

    Trainer.step = with_signal  # type: ignore[method-assign]
    found: dict[str, Any] = {"stopped": train(cfg)}
    Trainer.step = step  # type: ignore[method-assign]
    found["went on"] = train(cfg, resume=True)
    found["broken"] = seen(broken)
    writer = HuggingFaceStorageWriter
    write = writer.write_data

    def with_full_disk(trainer: Trainer, on_tokens: Callable[[int], None]) -> Any:
        if trainer.steps_done == 1 and is_odd:
            writer.write_data = no_space  # type: ignore[method-assign]
        return step(trainer, on_tokens)

    Trainer.step = with_full_disk  # type: ignore[method-assign]
    found["full"] = seen(full)
    Trainer.step, writer.write_data = step, write  # type: ignore[method-assign]
    found["unfinished"] = list(Path(full.output_dir).rglob("*.tmp"))
    found["full went on"] = train(full, resume=True)
    new = with_output(cfg, Path(cfg.output_dir).with_name("new"))
    trainer = replace(new.trainer, seed=7) if is_odd else new.trainer
    found["seed"] = seen(replace(new, trainer=trainer))
    rank_agreement.__version__ = "9.9" if is_odd else version
    found["version"] = seen(new)
    rank_agreement.__version__ = version
    run.load_inputs = with_fewer_prompts if is_odd else load
    found["data"] = seen(new)
    run.load_inputs = load
    found["doctor"] = report_ranks()[1]
    found["left"] = Path(new.output_dir).exists()
    part()
    return found


@pytest.mark.slow
def test_all_ranks_end_for_the_reason_of_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    cfg = run_config(tiny_model_dir, tmp_path / "run", {"checkpoint": {"every": 0}})
    failing = RewardConfig(function="tests.tiny_rewards:fails_on_rank_1", on_error="stop")
    broken = replace(with_output(cfg, tmp_path / "broken"), reward=failing)
    full = run_config(tiny_model_dir, tmp_path / "full", {"checkpoint": {"every": 1}})
    work = "tests.aepo_fast.world.test_failures:end_each"
    first, second = run_ranks(work, 2, tmp_path, cfg, broken, full)
    for found in (first, second):
        assert found["stopped"] == 128 + signal.SIGTERM and found["went on"] == 0
        assert "the judge of rank 1 is gone" in found["broken"][0]
        assert re.search(r"Saved .*step_\d; go on with --resume$", found["broken"][0])
        assert not found["left"]
        # torch's error of a part that was not written is no Exception, and would pass by all that
        # waits for one.
        assert found["full"][0].startswith("CheckpointError: cannot write checkpoint ")
        assert "step_2: rank 1: [Errno 28] No space left on device (" in found["full"][0]
        assert re.search(r"the last complete one is \S*step_1\. Free some", found["full"][0])
        assert not found["unfinished"] and found["full went on"] == 0
    assert [first[name][0] for name in ("broken", "seed", "version", "data")] == [
        second[name][0] for name in ("broken", "seed", "version", "data")
    ]
    assert first["seed"][0] == (
        "ConfigError: trainer.seed = 0: is not the same on all ranks (rank 0: 0; rank 1: 7). "
        "Start all ranks with the same configuration and the same environment."
    )
    assert "version of aepo_fast = " in first["version"][0]
    assert "rank 1: '9.9')" in first["version"][0]
    assert "data (prompts to train with) = " in first["data"][0]
    doctor = first["doctor"].splitlines()
    assert [line.split(":")[0] for line in doctor[:3]] == ["ranks", "  rank 0", "  rank 1"]
    assert doctor[3] == "  adding up over 2 ranks: gloo works"
    assert all(first[name][1] and not second[name][1] for name in ("broken", "seed", "data"))
    assert [line["step"] for line in lines_of(cfg)] == [1, 2, 3, 4]
    assert [line["step"] for line in lines_of(full)] == [1, 2, 3, 4]
    logs = [(tmp_path / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert "SIGTERM: saved " in logs[0] and "SIGTERM" not in logs[1]
