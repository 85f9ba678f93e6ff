"""Whole runs of the tiny model: resume, kill, signals, non-finite steps, logs."""

from __future__ import annotations

import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.config.sections import (
    CheckpointConfig,
    Config,
    EvalConfig,
    LoggingConfig,
    RewardConfig,
    RolloutConfig,
)
from aepo_fast.rewards.reward import RewardError
from aepo_fast.rollout.load import check_rollout_backend
from aepo_fast.training import run as run_module
from aepo_fast.training import update as update_module
from aepo_fast.training.checkpoint import CheckpointError, complete_checkpoints
from aepo_fast.training.run import train
from aepo_fast.training.trainer import TrainingError
from tests.tiny_model import build_tiny_model
from tests.tiny_run import explained_metrics, tiny_config, with_trainer

# What differs between two runs of the same thing.
VARYING = ("time/", "perf/", "memory/")


def metrics_of(cfg: Config) -> list[dict[str, Any]]:
    lines = (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(VARYING)}
        for line in lines
    ]


def weights_of(cfg: Config) -> dict[str, torch.Tensor]:
    last = complete_checkpoints(Path(cfg.output_dir) / "checkpoints")[-1]
    assert last.name == f"step_{cfg.trainer.steps}"
    return load_file(last / "model.safetensors")


def assert_same_end(one: Config, other: Config) -> None:
    expected, actual = weights_of(one), weights_of(other)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
    assert metrics_of(one) == metrics_of(other)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {
            "aepo": AepoConfig(
                controller="pi", form="one_pass", integral_gain=0.3, entropy_target=5.6
            )
        },
        {"loss": LossConfig(policy="dapo", entropy_method="clip_cov", kl_coef=0.05)},
        {"loss": LossConfig(policy="gspo", entropy_method="adaptive_bonus", adaptive_target=6)},
    ],
    ids=["resample", "one_pass", "clip_cov+kl", "gspo+adaptive"],
)
def test_two_steps_resumed_for_two_more_equal_four(
    tiny_model_dir: Path, tmp_path: Path, sections: dict[str, Any]
) -> None:
    straight = tiny_config(tiny_model_dir, tmp_path / "straight", **sections)
    halves = replace(straight, output_dir=str(tmp_path / "halves"))
    assert train(straight) == 0
    assert train(with_trainer(halves, steps=2)) == 0
    assert train(halves, resume=True) == 0
    assert_same_end(straight, halves)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_from_there(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    straight = tiny_config(tiny_model_dir, tmp_path / "straight")
    cfg = replace(
        straight,
        output_dir=str(tmp_path / "stopped"),
        checkpoint=CheckpointConfig(every=0),
    )
    train(straight)
    original = run_module.Trainer.step
    calls = []

    def step(self: Any, on_tokens: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return original(self, on_tokens)

    monkeypatch.setattr(run_module.Trainer, "step", step)
    assert train(cfg) == 128 + number
    (saved,) = complete_checkpoints(tmp_path / "stopped" / "checkpoints")
    assert saved.name == "step_2"
    monkeypatch.undo()
    assert train(cfg, resume=True) == 0
    assert_same_end(straight, cfg)


def test_nonfinite_updates_are_skipped_counted_and_stop_the_run(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = update_module._forward_backward
    poisoned = iter([True, False])

    def poison_once(policy: Any, *rest: Any) -> Any:
        result = original(policy, *rest)
        if next(poisoned, False):
            next(policy.model.parameters()).grad[0, 0] = float("nan")
        return result

    cfg = with_trainer(tiny_config(tiny_model_dir, tmp_path / "once"), minibatches=1, steps=3)
    monkeypatch.setattr(update_module, "_forward_backward", poison_once)
    assert train(cfg) == 0
    lines = metrics_of(cfg)
    assert [line["skipped_updates"] for line in lines] == [1, 0, 0]
    assert [line["weights_version"] for line in lines] == [0, 1, 2]

    def poison_always(policy: Any, *rest: Any) -> Any:
        result = original(policy, *rest)
        next(policy.model.parameters()).grad[0, 0] = float("inf")
        return result

    cfg = with_trainer(tiny_config(tiny_model_dir, tmp_path / "always"), max_skipped_steps=3)
    monkeypatch.setattr(update_module, "_forward_backward", poison_always)
    with pytest.raises(TrainingError, match="max_skipped_steps = 3"):
        train(cfg)


def test_a_full_disk_leaves_the_older_checkpoint_intact(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    cfg = with_trainer(tiny_config(tiny_model_dir, tmp_path / "run"), steps=2)
    assert train(cfg) == 0
    before = weights_of(cfg)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a write beyond it fails
    try:
        with pytest.raises(CheckpointError, match=r"step_3.*step_2.*--resume"):
            train(with_trainer(cfg, steps=4), resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_1", "step_2"]
    assert all(torch.equal(before[name], value) for name, value in weights_of(cfg).items())
    assert train(with_trainer(cfg, steps=4), resume=True) == 0


def test_old_checkpoints_are_deleted_beyond_keep(tiny_model_dir: Path, tmp_path: Path) -> None:
    cfg = tiny_config(tiny_model_dir, tmp_path / "run", checkpoint=CheckpointConfig(1, keep=2))
    train(cfg)
    names = [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step_3", "step_4"]


def test_a_used_folder_is_refused_and_overwritten_only_when_asked(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    cfg = with_trainer(tiny_config(tiny_model_dir, tmp_path / "run"), steps=1)
    train(cfg)
    with pytest.raises(ConfigError, match="--resume"):
        train(cfg)
    assert train(cfg, overwrite=True) == 0


def test_a_checkpoint_of_another_model_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    cfg = with_trainer(tiny_config(tiny_model_dir, tmp_path / "run"), steps=1)
    train(cfg)
    other = build_tiny_model(tmp_path / "other", seed=1)
    changed = replace(cfg, model=replace(cfg.model, path=str(other)))
    with pytest.raises(ConfigError, match="model.path") as caught:
        train(changed, resume=True)
    assert str(tiny_model_dir) in str(caught.value)


def test_a_checkpoint_is_a_model_that_loads_like_any_other(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    cfg = with_trainer(tiny_config(tiny_model_dir, tmp_path / "first"), steps=1)
    train(cfg)
    last = complete_checkpoints(tmp_path / "first" / "checkpoints")[-1]
    config = json.loads((last / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    tokenizer = json.loads((last / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = with_trainer(tiny_config(last, tmp_path / "second"), steps=1)
    assert train(again) == 0


def test_reward_errors_stop_the_run_or_are_counted(tiny_model_dir: Path, tmp_path: Path) -> None:
    name = "tests.tiny_rewards:broken_on_the_third"
    cfg = with_trainer(tiny_config(tiny_model_dir, tmp_path / "stop"), steps=1)
    with pytest.raises(RewardError, match="sample 2"):
        train(replace(cfg, reward=RewardConfig(function=name, on_error="stop")))
    counted = replace(
        cfg,
        output_dir=str(tmp_path / "count"),
        reward=RewardConfig(function=name, overlap=False),
    )
    with pytest.warns(RuntimeWarning, match="sample 2"):
        assert train(counted) == 0
    assert metrics_of(counted)[0]["reward_errors"] == 1


def test_a_step_without_any_reward_stops_the_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    name = "tests.tiny_rewards:silent"
    cfg = tiny_config(tiny_model_dir, tmp_path / "run", reward=RewardConfig(function=name))
    with pytest.raises(RewardError, match="silent.*step 1"):
        train(cfg)


def test_more_than_one_process_needs_torchrun(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE = '2': .*torchrun"):
        train(tiny_config(tiny_model_dir, tmp_path / "run"))


def test_a_head_backend_that_cannot_run_is_refused_before_any_model_loads(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cfg = tiny_config(tiny_model_dir, tmp_path / "run")
    fused = replace(cfg, model=replace(cfg.model, head_backend="fused"))
    fused = replace(fused, trainer=replace(cfg.trainer, device="cpu"))
    with pytest.raises(ConfigError, match=r"= 'fused': .*need a GPU.*Use another"):
        train(fused)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("AEPO_KERNELS_BACKEND", "fusd")
    with pytest.raises(ConfigError, match=r"= 'auto': AEPO_KERNELS_BACKEND = 'fusd': no such"):
        train(cfg)


def test_vllm_that_is_not_installed_is_said_before_any_model_loads(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cfg = tiny_config(tiny_model_dir, tmp_path / "run", rollout=RolloutConfig(backend="vllm"))
    with pytest.raises(ConfigError, match="rollout.backend = 'vllm': vLLM is not installed"):
        train(cfg)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("version", ["0.27.1", "0.25.1", ""])
def test_a_vllm_that_is_too_old_is_refused_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("aepo_fast.rollout.load.vllm_version", lambda: version)
    cfg = tiny_config(tmp_path, tmp_path / "run", rollout=RolloutConfig(backend="vllm"))
    with pytest.raises(ConfigError, match=rf"vLLM {version} is installed.*>=0.26"):
        train(cfg)
    allowed = replace(cfg.rollout, allow_untested_vllm=True)
    check_rollout_backend(replace(cfg, rollout=allowed))
    monkeypatch.setattr("aepo_fast.rollout.load.vllm_version", lambda: "0.29.1+cu130")
    check_rollout_backend(cfg)


@pytest.mark.parametrize("version", ["0.99.0", "0.99.1.dev3+g0123abc"])
def test_a_newer_vllm_is_said_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("aepo_fast.rollout.load.vllm_version", lambda: version)
    cfg = tiny_config(tmp_path, tmp_path / "run", rollout=RolloutConfig(backend="vllm"))
    with pytest.warns(RuntimeWarning, match="newer than tested.*canary compares its log-probs"):
        check_rollout_backend(cfg)


def test_every_promised_metric_is_logged_and_rollouts_are_kept(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    cfg = tiny_config(
        tiny_model_dir,
        tmp_path / "run",
        eval=EvalConfig(every=2, prompts=3, samples=2),
        logging=LoggingConfig(plot=True, rollouts_per_step=-1),
    )
    train(cfg)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval/avg@k" in line] == [0, 2, 4]
    promised = """step loss grad_norm reward reward_std frac_reward_zero_std entropy
        aepo/entropy_target aepo/temperature aepo/positive_fraction clip_ratio/low_mean
        clip_ratio/high_mean completions/mean_length completions/clipped_ratio time/rollout
        time/train time/step perf/rollout_tokens_per_s perf/train_tokens_per_s
        perf/peak_memory_gib""".split()
    for line in lines[1:]:
        assert not set(promised) - line.keys()
        assert line.keys() - {"step"} <= explained_metrics()
        assert line["kernel/backend"] == "chunked"
        assert line["kernel/rows"].startswith(("c++ (", "torch ("))
        assert all(line[name] == line[name] for name in promised)
    rollouts = [
        json.loads(x) for x in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    ]
    assert len(rollouts) == 4 * (16 + 8)  # main rows, and half as many auxiliary ones
    assert {row["temperature"] for row in rollouts if row["step"] == 1} == {1.0}
    for line in lines[2:]:
        sampled = {row["temperature"] for row in rollouts if row["step"] == line["step"]}
        assert sampled == {1.0, line["aepo/temperature"]}
    assert (tmp_path / "run" / "plot.png").stat().st_size > 10_000
    assert (tmp_path / "run" / "config.toml").exists()
