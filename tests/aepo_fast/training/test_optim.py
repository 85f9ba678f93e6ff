"""AdamW on float32 copies against float32 AdamW, its state, and storage that is not its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import CheckpointConfig, ModelConfig, RolloutConfig, TrainerConfig
from aepo_fast.training.optim import MasterAdamW, build_optimizer, guarded_step
from aepo_fast.training.optimizer_state import load_optimizer
from aepo_fast.training.run import train
from tests.aepo_fast.training.test_run import assert_same_end
from tests.tiny_run import copy_until, tiny_config, with_trainer

SETTINGS = TrainerConfig(lr=1e-4, weight_decay=0.1)


def layer(dtype: torch.dtype) -> nn.Linear:
    made = nn.Linear(5, 3)
    with torch.no_grad():
        for parameter in made.parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.copy_(torch.randn(parameter.shape, generator=generator).bfloat16())
    return made.to(dtype)


def backward(model: nn.Linear, seed: int) -> None:
    """Two micro-batches whose gradients bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        inputs = torch.randint(-3, 4, (2, 5), generator=generator).to(model.weight.dtype)
        model(inputs).sum().backward()


def test_small_steps_add_up_as_in_float32() -> None:
    exact, rounded = layer(torch.float32), layer(torch.bfloat16)
    one, other = build_optimizer(exact, SETTINGS), build_optimizer(rounded, SETTINGS)
    assert not isinstance(one, MasterAdamW) and isinstance(other, MasterAdamW)
    start = rounded.weight.detach().clone()
    for step in range(200):
        for model, optimizer in ((exact, one), (rounded, other)):
            backward(model, step)
            assert guarded_step(optimizer, 0.0, max_grad_norm=1.0)[1]
    for master, truth in zip(other.masters, (exact.weight, exact.bias), strict=True):
        torch.testing.assert_close(master, truth.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(rounded.weight, exact.weight.bfloat16())
    assert not torch.equal(rounded.weight, start)


def test_gradients_add_up_in_float32_and_are_freed() -> None:
    model = layer(torch.bfloat16)
    optimizer = build_optimizer(model, SETTINGS)
    assert isinstance(optimizer, MasterAdamW)
    for _ in range(1024):
        model(torch.ones(1, 5, dtype=torch.bfloat16)).sum().backward()
    assert model.weight.grad is None
    assert torch.equal(
        optimizer.masters[0].grad, torch.full((3, 5), 1024.0)
    )  # bfloat16 stops at 256
    norm, taken = guarded_step(optimizer, float("nan"), max_grad_norm=1.0)
    assert norm == pytest.approx(1024 * 18**0.5) and not taken
    assert optimizer.masters[0].grad is None


def test_it_writes_in_place_into_storage_of_others() -> None:
    model, home = layer(torch.bfloat16), torch.zeros(4, 5, dtype=torch.bfloat16)
    optimizer = build_optimizer(model, SETTINGS)
    home[1:].copy_(model.weight.detach())
    model.weight.data = home[1:]
    before = home.clone()
    for step in range(100):
        backward(model, step)
        guarded_step(optimizer, 0.0, max_grad_norm=1.0)
    assert not torch.equal(home[1:], before[1:]) and torch.equal(home[:1], before[:1])
    assert torch.equal(home[1:], model.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_optimizer_has_the_saved_state_and_todays_settings(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = layer(dtype)
    saved = build_optimizer(model, SETTINGS)
    backward(model, 0)
    guarded_step(saved, 0.0, max_grad_norm=1.0)
    torch.save(saved.state_dict(), tmp_path / "optimizer.pt")
    today = replace(SETTINGS, lr=1e-3, weight_decay=0.3, beta1=0.8, beta2=0.95, eps=1e-6)
    loaded = build_optimizer(layer(dtype), today)
    load_optimizer(tmp_path, loaded)
    for group, decay in zip(loaded.param_groups, (0.3, 0.0), strict=True):
        found = {name: group[name] for name in ("lr", "weight_decay", "betas", "eps")}
        assert found == {"lr": 1e-3, "weight_decay": decay, "betas": (0.8, 0.95), "eps": 1e-6}
    old, new = saved.state_dict(), loaded.state_dict()
    assert old["state"].keys() == new["state"].keys() == {0, 1}
    for index, state in old["state"].items():
        assert state["step"] == 1
        for name, value in state.items():
            assert torch.equal(value, new["state"][index][name])
    for master, other in zip(old.get("masters", []), new.get("masters", []), strict=True):
        assert torch.equal(master, other)


@pytest.mark.parametrize(("before", "after"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_state_of_weights_of_another_dtype_is_refused(
    before: str, after: str, tmp_path: Path
) -> None:
    saved = build_optimizer(layer(getattr(torch, before)), SETTINGS)
    torch.save(saved.state_dict(), tmp_path / "optimizer.pt")
    optimizer = build_optimizer(layer(getattr(torch, after)), SETTINGS)
    with pytest.raises(ConfigError, match=f"{after}.*trained as {before!r}") as caught:
        load_optimizer(tmp_path, optimizer)
    assert caught.value.key == "model.dtype"


def test_a_bfloat16_run_resumes_bit_for_bit(tiny_model_dir: Path, tmp_path: Path) -> None:
    small = ModelConfig(
        str(tiny_model_dir),
        dtype="bfloat16",
        compute_dtype="bfloat16",
        gradient_checkpointing=False,
    )
    whole, resumed = (
        with_trainer(
            replace(
                tiny_config(tiny_model_dir, tmp_path / name),
                model=small,
                rollout=RolloutConfig(max_new_tokens=6, dtype="bfloat16"),
                checkpoint=CheckpointConfig(every=1, keep=9),
            ),
            lr=1e-4,
        )
        for name in ("whole", "resumed")
    )
    train(whole)
    copy_until(2, whole, resumed)
    train(resumed, resume=True)
    assert_same_end(whole, resumed)
    lines = [json.loads(x) for x in (tmp_path / "whole" / "metrics.jsonl").open()]
    assert all(line["grad_norm"] > 0 for line in lines)
