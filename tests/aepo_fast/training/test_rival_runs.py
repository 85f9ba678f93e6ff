"""Whole runs of the tiny model with the rival entropy methods."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aepo_fast.config.method import AepoConfig, EntropyMethod, LossConfig
from aepo_fast.config.sections import Config
from aepo_fast.training.checkpoint import complete_checkpoints
from aepo_fast.training.run import train
from tests.tiny_run import tiny_config, with_trainer


def metrics_of(cfg: Config) -> list[dict[str, Any]]:
    lines = (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def last_checkpoint(cfg: Config) -> Path:
    return complete_checkpoints(Path(cfg.output_dir) / "checkpoints")[-1]


# The tiny model's entropy is near 5.6 nats and no token is likely: bounds that let the methods act.
BOUNDS: dict[EntropyMethod, dict[str, float]] = {
    "entropic": {"adaptive_target": 5.0, "entropic_min_prob": 1e-4},
    "repo_r": {"adaptive_target": 5.0},
    "era": {"era_entropy_low": 6.0},
}


def weights_of(cfg: Config) -> dict[str, torch.Tensor]:
    return load_file(last_checkpoint(cfg) / "model.safetensors")


@pytest.mark.parametrize(
    ("method", "policy", "aepo"),
    [
        ("entropic", "grpo", AepoConfig(enabled=False)),
        ("repo_r", "dapo", AepoConfig(form="one_pass")),
        ("era", "grpo", AepoConfig(enabled=False)),
        ("era", "cispo", AepoConfig(controller="published", alpha=0.5)),
        ("ucpo", "dr_grpo", AepoConfig(enabled=False)),
        ("ucpo", "gspo", AepoConfig(enabled=False)),
        ("ds_grpo", "grpo", AepoConfig(enabled=False)),
        ("ds_grpo", "gspo", AepoConfig(enabled=False)),
    ],
)
def test_two_steps_of_every_method(
    tiny_model_dir: Path, tmp_path: Path, method: EntropyMethod, policy: Any, aepo: AepoConfig
) -> None:
    loss = LossConfig(policy=policy, entropy_method=method, **BOUNDS.get(method, {}))
    cfg = with_trainer(tiny_config(tiny_model_dir, tmp_path / "run", loss=loss, aepo=aepo), steps=2)
    plain = replace(cfg, loss=LossConfig(policy=policy), output_dir=str(tmp_path / "plain"))
    assert train(cfg) == 0 and train(plain) == 0
    for metrics in metrics_of(cfg):
        numbers = [metrics[name] for name in ("loss", "grad_norm", "entropy", "policy_kl")]
        assert all(math.isfinite(number) for number in numbers)
    one, other = weights_of(cfg), weights_of(plain)
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("method", ["entropic", "repo_r"])
def test_a_resumed_controller_gives_the_same_weights(
    tiny_model_dir: Path, tmp_path: Path, method: EntropyMethod
) -> None:
    loss = LossConfig(entropy_method=method, **BOUNDS[method])
    straight = tiny_config(tiny_model_dir, tmp_path / "straight", loss=loss)
    halves = replace(straight, output_dir=str(tmp_path / "halves"))
    assert train(straight) == 0
    assert train(with_trainer(halves, steps=2)) == 0
    assert train(halves, resume=True) == 0
    one, other = weights_of(straight), weights_of(halves)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    saved = [torch.load(last_checkpoint(cfg) / "state.pt")["rival"] for cfg in (straight, halves)]
    assert saved[0] == saved[1]
    assert saved[0]["value"] not in (0.0, loss.repo_r_zeta)


def test_a_checkpoint_from_before_these_methods_goes_on(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    loss = LossConfig(entropy_method="adaptive_bonus", adaptive_target=6.0)
    straight = with_trainer(tiny_config(tiny_model_dir, tmp_path / "one", loss=loss), steps=2)
    older = replace(straight, output_dir=str(tmp_path / "older"))
    assert train(straight) == 0
    assert train(with_trainer(older, steps=1)) == 0
    path = last_checkpoint(older) / "state.pt"
    state = torch.load(path)
    del state["rival"]
    torch.save(state, path)
    assert train(older, resume=True) == 0
    one, other = weights_of(straight), weights_of(older)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
