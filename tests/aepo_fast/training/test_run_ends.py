"""What is kept of a run that ends early, and of an earlier run in its folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import resolve_machine
from aepo_fast.config.sections import CheckpointConfig, EvalConfig, LoggingConfig, RewardConfig
from aepo_fast.rewards.math_worker import MathWorker, MathWorkerError
from aepo_fast.rewards.reward import RewardError
from aepo_fast.rollout.engine import BrokenWeightsError, RolloutError
from aepo_fast.rollout.hf import HfRollout
from aepo_fast.training import run as run_module
from aepo_fast.training.checkpoint import complete_checkpoints
from aepo_fast.training.optim import HalfUpdateError
from aepo_fast.training.run import train
from aepo_fast.training.trainer import TrainingError
from tests.aepo_fast.training.test_run import assert_same_end, metrics_of
from tests.tiny_run import tiny_config, with_trainer


def saved(folder: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(folder / "checkpoints")]


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """Sampling raises `error` at its call of that number, not counting the check at the start."""
    plain, calls = HfRollout.generate, []

    def generate(self: HfRollout, *args: Any, **kwargs: Any) -> Any:
        if "on_tokens" in kwargs:
            calls.append(1)
            if len(calls) == call:
                raise error
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(HfRollout, "generate", generate)


def test_weights_that_give_no_finite_logits_are_not_saved(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    cfg = tiny_config(tiny_model_dir, folder, checkpoint=CheckpointConfig(every=2, keep=1))
    fail_at(monkeypatch, 4, BrokenWeightsError("the logits are not finite"))
    with pytest.raises(RolloutError, match=r"not finite, and nothing .* go on from .*step_2 with"):
        train(cfg)
    assert saved(folder) == ["step_2"]
    fail_at(monkeypatch, 1, BrokenWeightsError("the logits are not finite"))
    with pytest.raises(RolloutError, match="start anew; there is no checkpoint"):
        train(replace(cfg, output_dir=str(tmp_path / "other")))


@pytest.mark.parametrize("broken_in", ["training", "evaluation"])
def test_a_reward_that_fails_late_costs_no_step(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_in: str
) -> None:
    more = {"checkpoint": CheckpointConfig(every=0), "eval": EvalConfig(every=2, prompts=2)}
    whole = tiny_config(tiny_model_dir, tmp_path / "whole", **more)
    train(whole)
    cfg = replace(whole, output_dir=str(tmp_path / "run"))
    # Evaluations come before the first step and after the second.
    fail_at(monkeypatch, 5 if broken_in == "training" else 4, RewardError("sample 3: timeout"))
    with pytest.raises(RewardError, match=r"timeout. Saved .*step_2; go on with --resume"):
        train(cfg)
    assert saved(tmp_path / "run") == ["step_2"]
    assert [line["step"] for line in metrics_of(cfg)] == [0, 1, 2]
    train(cfg, resume=True)
    if broken_in == "training":
        assert_same_end(whole, cfg)


def test_memory_that_runs_out_is_said_with_its_settings(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny_config(tiny_model_dir, tmp_path / "run", checkpoint=CheckpointConfig(every=0))
    fail_at(monkeypatch, 2, torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nMore"))
    wanted = r"Tried 2 GiB: lower trainer.tokens_per_microbatch or .*Saved .*step_1; go on"
    with pytest.raises(TrainingError, match=wanted):
        train(cfg)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (RuntimeError("No.\nMore"), HalfUpdateError, "RuntimeError: No.\nwhile .*, in step 3\n"),
        (torch.OutOfMemoryError("No.\nMore"), TrainingError, "No: lower .*batch_rows. "),
    ],
)
def test_an_update_that_fails_in_its_middle_is_not_saved(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
    kind: type[Exception],
    words: str,
) -> None:
    plain, calls = torch.optim.AdamW.step, []

    def step(self: torch.optim.AdamW, *args: Any) -> None:
        plain(self, *args)
        calls.append(1)
        if len(calls) == 5:  # the first update of step 3
            raise fault

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    cfg = tiny_config(tiny_model_dir, tmp_path / "run", checkpoint=CheckpointConfig(every=0))
    with pytest.raises(kind, match=f"^{words}Nothing is saved$"):
        train(cfg)
    assert saved(tmp_path / "run") == []


def test_a_minibatch_may_be_empty(tiny_model_dir: Path, tmp_path: Path) -> None:
    reward = RewardConfig(function="tests.tiny_rewards:none_for_the_first_prompt", overlap=False)
    cfg = tiny_config(tiny_model_dir, tmp_path / "run", reward=reward)
    cfg = replace(cfg, aepo=replace(cfg.aepo, enabled=False))
    cfg = with_trainer(cfg, minibatches=4, steps=1)
    assert train(cfg) == 0
    (line,) = metrics_of(cfg)
    assert line["kernel/active_token_share"] > 0 and line["skipped_updates"] == 0


@pytest.mark.parametrize(("number", "overlap"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_is_heard_while_a_reward_hangs(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    overlap: bool,
) -> None:
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.chdir(tmp_path)
    reward = RewardConfig(function="tests.tiny_rewards:hanging", overlap=overlap, timeout_s=600.0)
    cfg = tiny_config(tiny_model_dir, tmp_path / "run", reward=reward)
    sent: list[float] = []

    def send() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.02)
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    assert train(cfg) == 128 + number
    assert time.monotonic() - sent[0] < 10
    for thread in threading.enumerate():  # and the process does not go on by itself
        if thread.name == "scorer":
            thread.join(5)
            assert not thread.is_alive()
    assert saved(tmp_path / "run") == ["step_0"]


def test_only_a_run_s_own_files_are_overwritten(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    cfg = with_trainer(tiny_config(tiny_model_dir, folder), steps=1)
    train(cfg)
    (folder / "notes.md").write_text("mine")
    (folder / "other").mkdir()
    (folder / "checkpoints" / "step_7").mkdir()
    assert train(cfg, overwrite=True) == 0
    assert (folder / "notes.md").read_text() == "mine" and (folder / "other").is_dir()
    assert saved(folder) == ["step_1"]


def test_an_earlier_run_is_there_until_the_new_one_can_start(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    cfg = with_trainer(tiny_config(tiny_model_dir, folder), steps=1)
    train(cfg)
    with pytest.raises(ConfigError, match="--overwrite.*Give one of the two"):
        train(cfg, resume=True, overwrite=True)
    logging = LoggingConfig(plot=False, tensorboard=True)
    monkeypatch.setitem(run_module.sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match="logging.tensorboard"):
        train(replace(cfg, logging=logging), overwrite=True)

    def refuse(*args: Any) -> None:
        raise ConfigError("model.attention", "x", "is not there", "Name another")

    monkeypatch.setattr(run_module, "Trainer", refuse)
    with pytest.raises(ConfigError, match="model.attention"):
        train(cfg, overwrite=True)
    assert saved(folder) == ["step_1"] and len(metrics_of(cfg)) == 1
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="holds an earlier run"):
        train(cfg)


def test_a_folder_that_cannot_be_written_is_said_first(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir = .*file/run"):
        train(tiny_config(tiny_model_dir, tmp_path / "file" / "run"))


def test_resuming_says_from_where(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = with_trainer(tiny_config(tiny_model_dir, tmp_path / "run"), steps=1)
    train(cfg, resume=True)
    assert "goes on from the start: there is no checkpoint" in capsys.readouterr().out
    unfinished = tmp_path / "run" / "checkpoints" / "step_9.tmp"
    unfinished.mkdir()
    train(with_trainer(cfg, steps=2), resume=True)
    assert "goes on from " + str(tmp_path / "run/checkpoints/step_1") in capsys.readouterr().out
    assert not unfinished.exists()


def test_layers_in_bfloat16_compute_in_nothing_else(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, tmp_path)
    held = replace(cfg.model, dtype="bfloat16")
    with pytest.raises(ConfigError, match="model.compute_dtype = 'float32'.*held in bfloat16"):
        resolve_machine(replace(cfg, model=held))
    machine = resolve_machine(replace(cfg, model=replace(held, compute_dtype="auto")))
    assert machine.weights_dtype == machine.compute_dtype == torch.bfloat16


def test_a_math_worker_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(MathWorkerError, match="ended with status 1"):
        MathWorker(timeout_s=2.0).verify("1", "1")


def test_lengths_beyond_the_models_are_said_before_it_loads(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    cfg = tiny_config(tiny_model_dir, tmp_path / "run")
    long = replace(cfg.rollout, max_new_tokens=250)
    wanted = (
        r"rollout.max_new_tokens = 250: with prompts of up to \d+ tokens .* model's 256. Set it to"
    )
    with pytest.raises(ConfigError, match=wanted):
        train(replace(cfg, rollout=long))


def test_a_tokenizer_without_an_end_token_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    for name, key in {"tokenizer_config.json": "eos_token", "config.json": "eos_token_id"}.items():
        settings = json.loads((model / name).read_text())
        settings[key] = None
        (model / name).write_text(json.dumps(settings))
    (model / "generation_config.json").unlink()
    with pytest.raises(ConfigError, match="generation_config.json names an end token. Set eos_to"):
        train(tiny_config(model, tmp_path / "run"))


def test_another_spelling_of_the_model_resumes(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    cfg = with_trainer(tiny_config(model, tmp_path / "run"), steps=1)
    train(cfg)
    monkeypatch.chdir(tmp_path)
    for spelling in ("model/", "../" + tmp_path.name + "/model"):
        other = replace(cfg, model=replace(cfg.model, path=spelling))
        assert train(other, resume=True) == 0


def test_a_state_that_hf_cannot_split_is_refused(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "aepo_fast.rollout.load.recurrent_layers", lambda config: ["linear_attention"]
    )
    with pytest.raises(ConfigError, match='rollout.backend.*linear_attention layers. Use "vllm"'):
        train(tiny_config(tiny_model_dir, tmp_path / "run"))
