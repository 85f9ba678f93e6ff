"""The benchmark of whole runs: its clock, TRL's settings, its table and the command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aepo_fast.config.toml import load_config
from bench import tables
from bench.__main__ import main
from bench.e2e import CANDIDATES, OURS, TRL, TRL_OUR_HEAD, child, ours
from bench.e2e import run as e2e
from bench.e2e.ours import by_lap
from bench.e2e.phases import (
    LEARNING,
    LOGPROBS,
    OPTIMIZER,
    OTHER,
    PHASES,
    REWARD,
    ROLLOUT,
    PhaseClock,
)
from bench.e2e.recorder import Recorder
from bench.e2e.table import table
from bench.e2e.trl_run import check_prompts, grpo_settings
from tests.tiny_run import a_machine


def busy(seconds: float) -> None:
    time.sleep(seconds)


def test_clock_charges_time_to_the_innermost_phase() -> None:
    clock, trainer = PhaseClock(), SimpleNamespace(generate=busy)
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    clock.watch(optimizer)
    clock.wrap(trainer, "generate", lambda: ROLLOUT)
    clock.start()
    with clock.phase(LEARNING):
        busy(0.02)
        trainer.generate(0.05)
        weight.grad = torch.ones(1)
        optimizer.step()
    busy(0.01)
    first = clock.stop()
    assert list(first) == list(PHASES)
    assert first[ROLLOUT] > 0.045 and 0.015 < first[LEARNING] < first[ROLLOUT]
    assert first[OPTIMIZER] > 0 and first[OTHER] > 0.005 and not first[REWARD] + first[LOGPROBS]
    clock.start()
    assert sum(clock.stop().values()) < 0.04  # and a new step begins with none of it


def test_our_laps_become_phases_and_the_sum_stays() -> None:
    seconds = dict.fromkeys(PHASES, 0.0) | {OPTIMIZER: 2.0, OTHER: 18.0}
    by_lap(seconds, {"rollout": 5, "reward": 1, "score": 3, "train": 8, "sync": 1, "wait": 0.5})
    assert seconds == {
        ROLLOUT: 6,
        REWARD: 1,
        LOGPROBS: 3,
        LEARNING: 6,
        OPTIMIZER: 2,
        OTHER: 2,
    }


def test_recorder_saves_every_so_many_steps_and_the_last(tmp_path: Path) -> None:
    recorder, saved = Recorder(tmp_path, steps=5, every=2), []
    for number in range(5):
        recorder.clock.start()
        recorder.end_step(saved.append, tokens=number)
    assert saved == [tmp_path / f"step_{number}" for number in (2, 4, 5)]
    found = recorder.record()
    assert [one["step"] for one in found["saved"]] == [2, 4, 5]
    assert found["saved"][-1]["wall_s"] == pytest.approx(recorder.wall, abs=1e-3)
    assert [step["tokens"] for step in found["steps"]] == [0, 1, 2, 3, 4]
    assert found["peak_bytes"] > 2**26


def test_trl_s_settings_are_ours() -> None:
    changes = ["trainer.tokens_per_microbatch=1000", "trainer.beta1=0.5", "trainer.lr=3e-6"]
    cfg = load_config(str(e2e.SETTINGS), changes)
    found = grpo_settings(cfg, a_machine(compute=torch.bfloat16), longest=40)
    # 64 samples of 88 tokens: 11 of them would fit, 8 divide a step evenly.
    assert found["per_device_train_batch_size"] == 8
    assert found["gradient_accumulation_steps"] == 8
    assert (found["adam_beta1"], found["learning_rate"]) == (0.5, 3e-6)
    assert found["bf16"] and found["use_cpu"] and "use_vllm" not in found
    assert not grpo_settings(cfg, a_machine(), longest=40)["bf16"]
    tight = load_config(str(e2e.SETTINGS), ["trainer.tokens_per_microbatch=10"])
    assert grpo_settings(tight, a_machine(), longest=40)["per_device_train_batch_size"] == 1
    with_vllm = load_config(str(e2e.SETTINGS), ["rollout.backend=vllm"])
    found = grpo_settings(with_vllm, a_machine(), longest=40)
    assert found["use_vllm"] and found["vllm_importance_sampling_mode"] == "token_truncate"
    assert with_vllm.loss.correction == "token_truncate"
    assert found["vllm_importance_sampling_clip_max"] == with_vllm.loss.correction_high


def test_other_prompts_are_refused() -> None:
    prompt: Any = SimpleNamespace(messages=({"role": "user", "content": "?"},), token_ids=(1, 2))
    tokenizer = SimpleNamespace(apply_chat_template=lambda *a, **b: {"input_ids": [[1, 2]]})
    check_prompts(tokenizer, [prompt])
    prompt.token_ids = (1, 2, 3)
    with pytest.raises(RuntimeError, match="other tokens"):
        check_prompts(tokenizer, [prompt])


@pytest.mark.parametrize("change", ["aepo.enabled=true", "loss.kl_coef=0.1", "trainer.epochs=2"])
def test_what_makes_the_runs_equal_cannot_be_changed(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "e2e", "--set", change])
    with pytest.raises(SystemExit, match="cannot be changed"):
        main()


def test_summary_leaves_the_first_step_out() -> None:
    steps = [
        {"seconds": seconds, "phases": {"rollout": seconds / 2}, "tokens": tokens}
        for seconds, tokens in ((90, 1), (2, 10), (4, 20), (9, 30))
    ]
    found = e2e.summary(steps)
    assert found == {"median_s": 4, "median_phases_s": {"rollout": 2}, "tokens_per_s": 4}
    assert e2e.summary(steps[:1])["median_s"] == 90


def fake_run(rate: float, **changes: Any) -> dict[str, Any]:
    saved = [{"step": 9, "wall_s": 31.4, "accuracy": 0.5}]
    found = {"status": "ok", "message": "", "saved": saved, "peak_bytes": 2**30}
    found |= {"peak_gpu_bytes": None, "median_s": 2.5, "tokens_per_s": rate, "with": {}}
    return found | {"median_phases_s": dict.fromkeys(PHASES, 0.25)} | changes


def test_table_compares_with_trl_of_the_same_sampler() -> None:
    missing = {"status": "not available", "message": "ImportError: no trl"}
    text = table({TRL: fake_run(100.0), OURS: fake_run(350.0), TRL_OUR_HEAD: missing})
    cells = "0.25 | 0.25 | 0.25 | 0.25 | 0.50 | 1,024 MiB | 0.50 after 31 s |"
    assert f"| ours | 2.50 | 350 | 3.50 | {cells}" in text
    assert f"| {TRL_OUR_HEAD} | not available | - " in text and "ImportError: no trl |" in text
    alone = {TRL: fake_run(100.0), f"{OURS}, vllm": fake_run(350.0, peak_gpu_bytes=2**31)}
    assert "| ours, vllm | 2.50 | 350 | - |" in table(alone)
    assert "1,024 MiB, GPU 2,048 MiB" in table(alone)
    alone[f"{TRL}, vllm"] = fake_run(175.0)
    assert "| ours, vllm | 2.50 | 350 | 2.00 |" in table(alone)


def run_tiny(
    model: Path, results: Path, monkeypatch: pytest.MonkeyPatch, *words: str
) -> dict[str, Any]:
    """The record of the command with the tiny model and a reward that it can earn."""
    sizes = ["--steps", "3", "--prompts", "2", "--samples", "4", "--tokens", "6"]
    changes = ['reward.function="tests.tiny_rewards:even_start"', "eval.prompts=2"]
    changes += ["eval.samples=2", "model.compute_dtype=float32", "rollout.dtype=float32"]
    given = [word for change in changes for word in ("--set", change)]
    places = ["--model", str(model), "--results", str(results)]
    command = ["bench", "e2e", "--rollouts", "hf", *sizes, *given, *places, *words]
    monkeypatch.setattr("sys.argv", command)
    main()
    (path,) = results.glob("*/e2e-*.json")
    return json.loads(path.read_text())


def check_run(found: dict[str, Any], saved: list[int]) -> None:
    """Whether a candidate's run of 3 steps is complete."""
    assert found["status"] == "ok", found["message"]
    assert len(found["steps"]) == 3 and found["tokens_per_s"] > 0
    for step in found["steps"]:
        assert step["seconds"] == pytest.approx(sum(step["phases"].values()), abs=1e-3)
        assert all(step["phases"][phase] > 0 for phase in (ROLLOUT, LEARNING, OPTIMIZER))
        assert step["tokens"] <= 2 * 4 * 6 and 0 <= step["reward"] <= 1
        assert step["entropy"] > 0
    assert [one["step"] for one in found["saved"]] == saved
    assert all(0 <= one["accuracy"] <= 1 for one in found["saved"])


class InThisProcess:
    """Does what a child's command says at once, without the seconds that its imports take."""

    def __init__(self, command: list[str], **_: Any) -> None:
        assert command[1:4] == ["-u", "-m", "bench.e2e.child"]
        child.main(command[4], Path(command[5]))

    def wait(self) -> int:
        return 0

    def kill(self) -> None:
        pass


def test_command_runs_ours(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = SimpleNamespace(Popen=InThisProcess, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(e2e, "subprocess", here)
    monkeypatch.setattr(ours, "keep_freed_memory", lambda: None)
    record = run_tiny(tiny_model_dir, tmp_path, monkeypatch, "--skip", "TRL")
    check_run(record["candidates"][OURS], [3])
    assert record["settings"]["steps"] == 3 and record["base"]["prompts"] == 2
    assert str(tiny_model_dir) not in record["config"]
    assert "/run" not in json.dumps(record["candidates"])
    assert "| ours | " in capsys.readouterr().out
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    block = tables.e2e(on_cpu=record["environment"]["device"] == "cpu")
    assert "TRL none, a folder on products: 3 steps of 2 prompts" in block


def test_a_missing_trainer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    cfg = load_config(str(e2e.SETTINGS))
    found = child.run(TRL, cfg, tmp_path, every=0)
    assert found["status"] == "not available"
    assert found["message"].startswith("ModuleNotFoundError: import of trl")


def test_a_run_that_fails_is_listed(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--skip", "TRL", "--set", "trainer.max_grad_norm=1e-9"]
    (tmp_path / "bench.py").write_text("raise ImportError('not the benchmark')")
    monkeypatch.setattr(e2e, "child_environment", lambda first: {"env": {}, "cwd": tmp_path})
    record = run_tiny(tiny_model_dir, tmp_path, monkeypatch, *words)
    found = record["candidates"][OURS]
    assert found["status"] == "failed" and "exit code 1" in found["message"]
    assert "| ours | failed | - |" in table(record["candidates"])


@pytest.mark.peers
def test_command_runs_all_three(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    record = run_tiny(tiny_model_dir, tmp_path, monkeypatch)
    assert list(record["candidates"]) == list(CANDIDATES)
    for found in record["candidates"].values():
        check_run(found, [3])
    theirs, with_our_head, own = record["candidates"].values()
    assert "aepo_kernels" in with_our_head["with"]["replaced"] and not theirs["with"]["replaced"]
    # The same seed samples the same, and the head changes no more than roundings.
    for mine, other in zip(with_our_head["steps"], theirs["steps"], strict=True):
        assert mine["reward"] == other["reward"] and mine["tokens"] == other["tokens"]
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert mine["entropy"] == pytest.approx(other["entropy"], rel=1e-5)
    # Ours samples otherwise, from the same model.
    first = own["steps"][0]["entropy"]
    assert first == pytest.approx(theirs["steps"][0]["entropy"], rel=0.02)
