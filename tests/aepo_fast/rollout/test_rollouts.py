"""Rollouts one step ahead: older weights, known as such, and resumed as if never stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import CheckpointConfig, Config, RewardConfig, RolloutConfig
from aepo_fast.rewards.reward import RewardError
from aepo_fast.rollout.engine import RolloutError
from aepo_fast.rollout.hf import HfRollout
from aepo_fast.training.interrupt import InterruptGuard
from aepo_fast.training.run import train
from tests.aepo_fast.training.test_run import assert_same_end, metrics_of
from tests.tiny_run import copy_until, tiny_config, with_trainer

AHEAD = RolloutConfig(max_new_tokens=6, dtype="bfloat16", steps_ahead=1)


def config(model: Path, output: Path, **sections: Any) -> Config:
    keep = CheckpointConfig(every=1, keep=9)
    return tiny_config(model, output, **{"rollout": AHEAD, "checkpoint": keep, **sections})


def test_samples_come_from_the_weights_of_one_step_before(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    cfg = config(tiny_model_dir, tmp_path / "run")
    train(cfg)
    lines = metrics_of(cfg)
    assert [line["sampling/version_lag"] for line in lines] == [0, 2, 2, 2]  # two updates a step
    assert all(line["sampling/importance_sampling_ratio/mean"] > 0 for line in lines)
    path = tmp_path / "run" / "rollouts.jsonl"
    versions = {(row["step"], row["weights_version"]) for row in map(json.loads, path.open())}
    assert versions == {(1, 0), (2, 0), (3, 2), (4, 4)}
    # AEPO's temperature is the one that was known when the samples were drawn.
    assert lines[1]["aepo/temperature"] == 1.0 != lines[2]["aepo/temperature"]


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_what_is_sampled_while_training_has_the_same_sums_throughout(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_ahead: int
) -> None:
    """The kernels switch cuBLAS for the whole process, and the sampler runs beside them."""
    settings, name = torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"
    assert getattr(settings, name)
    plain, reduced = HfRollout.generate, []

    def generate(self: HfRollout, *args: Any, **kwargs: Any) -> Any:
        if "on_tokens" in kwargs:  # not the check at the start
            reduced.append(getattr(settings, name))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(HfRollout, "generate", generate)
    rollout = replace(AHEAD, steps_ahead=steps_ahead)
    cfg = config(tiny_model_dir, tmp_path / "run", rollout=rollout)
    train(with_trainer(cfg, steps=3))
    assert set(reduced) == {not steps_ahead} and len(reduced) >= 3
    assert getattr(settings, name)


def test_a_resumed_run_uses_what_was_sampled_ahead(tiny_model_dir: Path, tmp_path: Path) -> None:
    whole, resumed = (config(tiny_model_dir, tmp_path / name) for name in ("whole", "resumed"))
    train(whole)
    copy_until(2, whole, resumed)
    train(resumed, resume=True)
    assert_same_end(whole, resumed)


def test_a_checkpoint_with_task_rewards_beside_the_rows_resumes(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    whole, older = (config(tiny_model_dir, tmp_path / name) for name in ("whole", "older"))
    train(whole)
    copy_until(2, whole, older)
    path = tmp_path / "older" / "checkpoints" / "step_2" / "state.pt"
    state = torch.load(path, weights_only=True)
    saved = state["rollouts"]["ahead"]["rollout"]
    assert "task_rewards" not in saved
    saved["task_rewards"] = [row["task_reward"] for row in saved["rows"]]
    torch.save(state, path)
    train(older, resume=True)
    assert_same_end(whole, older)


def test_without_it_nothing_changes_whether_rewards_overlap_or_not(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    plain = tiny_config(tiny_model_dir, tmp_path / "plain")
    train(plain)
    reward = replace(plain.reward, overlap=False)
    other = tiny_config(tiny_model_dir, tmp_path / "other", reward=reward)
    train(other)
    assert_same_end(plain, other)
    assert {line["sampling/version_lag"] for line in metrics_of(plain)} == {0}


def test_a_failure_ahead_is_raised_when_its_step_comes(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_judge").touch()
    function = "tests.tiny_rewards:failing_third_call"
    reward = RewardConfig(function, overlap=False, on_error="stop")
    cfg = config(tiny_model_dir, tmp_path / "run", reward=reward)
    with pytest.raises(RewardError, match="the judge is gone"):
        train(cfg)
    # Calls: steps 1 and 2, then step 3's rollout fails while step 2 trains, which is kept.
    assert [line["step"] for line in metrics_of(cfg)] == [1, 2]
    (tmp_path / "no_judge").unlink()
    train(cfg, resume=True)
    assert [line["step"] for line in metrics_of(cfg)] == [1, 2, 3, 4]


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_failed_rollout_saves_the_run_first(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_ahead: int
) -> None:
    rollout = replace(AHEAD, steps_ahead=steps_ahead)
    whole = config(tiny_model_dir, tmp_path / "whole", rollout=rollout)
    train(whole)
    cfg = config(
        tiny_model_dir, tmp_path / "run", rollout=rollout, checkpoint=CheckpointConfig(every=0)
    )
    plain, calls = HfRollout.generate, []

    def generate(self: HfRollout, *args: Any, **kwargs: Any) -> Any:
        if "on_tokens" in kwargs:  # not the check at the start
            calls.append(1)
            if len(calls) == 4:
                raise RolloutError("out of memory")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(HfRollout, "generate", generate)
    with pytest.raises(RolloutError, match=r"out of memory. Saved .*step_3; go on with --resume"):
        train(cfg)
    train(cfg, resume=True)
    if not steps_ahead:  # the samples drawn again are those of newer weights
        assert_same_end(whole, cfg)
    assert [line["step"] for line in metrics_of(cfg)] == [1, 2, 3, 4]


@pytest.mark.parametrize("at", [3, 11, 14, 17])
def test_a_signal_while_sampling_ahead_saves_and_resumes(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    whole = config(tiny_model_dir, tmp_path / "whole")
    train(whole)
    cfg = config(tiny_model_dir, tmp_path / "run", checkpoint=CheckpointConfig(every=0))
    plain, checks = InterruptGuard.check, []

    def check(self: InterruptGuard) -> None:
        checks.append(1)
        if len(checks) == at:
            self._received = 15
        plain(self)

    monkeypatch.setattr(InterruptGuard, "check", check)
    assert train(cfg) == 143
    monkeypatch.undo()
    train(cfg, resume=True)
    assert_same_end(whole, cfg)


def test_the_weights_being_trained_cannot_be_sampled_from(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    cfg = config(tiny_model_dir, tmp_path / "run", rollout=replace(AHEAD, dtype="float32"))
    with pytest.raises(ConfigError, match="rollout.steps_ahead = 1.*very weights"):
        train(cfg)


def test_steps_beyond_the_last_are_not_sampled(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = HfRollout.generate, []

    def generate(self: HfRollout, *args: Any, **kwargs: Any) -> Any:
        if "on_tokens" in kwargs:  # not the check at the start
            calls.append(torch.is_inference_mode_enabled())
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(HfRollout, "generate", generate)
    train(with_trainer(config(tiny_model_dir, tmp_path / "run"), steps=3))
    assert len(calls) == 3


def test_samples_of_other_prompts_than_planned_are_refused(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    cfg = config(tiny_model_dir, tmp_path / "run")
    train(with_trainer(cfg, steps=4))
    copy = config(tiny_model_dir, tmp_path / "copy")
    copy_until(2, cfg, copy)
    with pytest.raises(
        ConfigError, match="prompts_per_step = 2: the checkpoint holds .* of 4 prom"
    ):
        train(with_trainer(copy, prompts_per_step=2), resume=True)
