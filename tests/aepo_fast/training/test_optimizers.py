"""The other optimizers: small steps count, states resume bitwise, and what cannot be is refused."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import Config, LoraConfig, TrainerConfig
from aepo_fast.training.optim import (
    MuonAndAdamW,
    build_optimizer,
    check_optimizer,
    guarded_step,
    set_learning_rate,
)
from aepo_fast.training.run import train
from tests.aepo_fast.training.test_run import assert_same_end
from tests.tiny_run import copy_until, tiny_config, with_trainer

DTYPES = {"adamw_8bit": "bfloat16", "adamw_bf16": "bfloat16", "muon": "float32"}


def of(name: str, output: Path, model: Path, dtype: str | None = None) -> Config:
    cfg, own = tiny_config(model, output), dtype or DTYPES[name]
    changes: dict[str, Any] = {"dtype": own, "compute_dtype": own}
    return replace(
        cfg,
        model=replace(cfg.model, **changes),
        trainer=replace(cfg.trainer, optimizer=name, lr=1e-3),
        checkpoint=replace(cfg.checkpoint, keep=9),
    )


@pytest.mark.parametrize("name", list(DTYPES))
def test_a_resumed_run_ends_bitwise_as_one_that_never_stopped(
    name: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    cfg = of(name, tmp_path / "whole", tiny_model_dir)
    assert train(cfg) == 0
    again = replace(cfg, output_dir=str(tmp_path / "again"))
    copy_until(2, cfg, again)
    assert train(again, resume=True) == 0
    assert_same_end(cfg, again)
    other = with_trainer(again, optimizer="adamw_8bit" if name != "adamw_8bit" else "adamw")
    with pytest.raises(ConfigError, match=rf"trainer\.optimizer = .* has the state of '{name}'"):
        train(other, resume=True)


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_bf16"])
def test_steps_that_bfloat16_cannot_tell_apart_count_on_average(name: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(128, 128, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    cfg = TrainerConfig(optimizer=name, lr=1e-5, weight_decay=0.0)
    optimizer = build_optimizer(model, cfg)
    for _ in range(40):
        model.weight.grad = torch.ones_like(model.weight)
        assert guarded_step(optimizer, 0.0, max_grad_norm=1e9)[1]
    # One step is a 390th of the distance of two bfloat16 numbers below 1. Without noise in the
    # gradient, each of AdamW's steps is lr.
    moved = 1 - model.weight.double().mean().item()
    assert moved == pytest.approx(40 * 1e-5, rel=0.1)


def test_an_8_bit_state_takes_a_byte_a_number() -> None:
    model = nn.Linear(64, 256, bias=True)
    optimizer = build_optimizer(model, TrainerConfig(optimizer="adamw_8bit"))
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    held = optimizer.state[model.weight]["exp_avg"]
    assert held.codes.dtype == torch.uint8 and held.codes.numel() == model.weight.numel()


def test_an_8_bit_step_is_adamw_s_within_the_state_s_rounding() -> None:
    moved = []
    for name in ("adamw", "adamw_8bit"):
        torch.manual_seed(0)
        model = nn.Linear(64, 256)
        before = model.weight.detach().clone()
        cfg = TrainerConfig(optimizer=name, lr=1e-2)  # type: ignore[arg-type]
        optimizer = build_optimizer(model, cfg)
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            model(torch.randn(32, 64, generator=generator)).square().sum().backward()
            guarded_step(optimizer, 0.0, max_grad_norm=1.0)
        moved.append(model.weight.detach() - before)
    one, other = moved
    assert (one - other).norm() < 0.1 * one.norm()


def test_muon_takes_the_matrices_of_layers_and_orthogonalises_their_steps() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.layer = nn.Embedding(10, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 10, bias=False)

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model = Small()
    cfg = TrainerConfig(optimizer="muon", lr=0.1, weight_decay=0.0)
    optimizer = build_optimizer(model, cfg)
    assert isinstance(optimizer, MuonAndAdamW)
    (group,) = optimizer.muon.param_groups
    assert [id(p) for p in group["params"]] == [id(model.layer.weight)]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    before = model.layer.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q for _ in range(2))
    model.layer.weight.grad = u @ torch.linspace(1, 3, 8).diag() @ v
    set_learning_rate(optimizer, 0.05)
    optimizer.step()
    step = (before - model.layer.weight.detach()) / 0.05
    # Nearly the orthogonal matrix next to the gradient, with a root mean square of 0.2, as AdamW's
    # steps tend to have.
    assert torch.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.95
    assert step.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_learning_rates_reach_every_group() -> None:
    for name in ("adamw", "adamw_8bit", "muon"):
        cfg = TrainerConfig(optimizer=name)  # type: ignore[arg-type]
        optimizer = build_optimizer(nn.Linear(4, 4), cfg)
        set_learning_rate(optimizer, 0.25)
        assert {float(group["lr"]) for group in optimizer.param_groups} == {0.25}


def test_what_an_optimizer_cannot_hold_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'adamw_bf16': is for weights in bfloat16"):
        of("adamw_bf16", tmp_path, tiny_model_dir, dtype="float32")
    with pytest.raises(ConfigError, match="'muon': holds no float32 copies"):
        of("muon", tmp_path, tiny_model_dir, dtype="bfloat16")
    cfg = of("adamw_bf16", tmp_path, tiny_model_dir)
    with pytest.raises(ConfigError, match="what is trained is in float32"):
        replace(cfg, model=replace(cfg.model, lora=LoraConfig(rank=4)))


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_optimizer(TrainerConfig())
    with pytest.raises(ConfigError, match=r"torchao is not installed\. pip install 'aepo-fast\["):
        check_optimizer(TrainerConfig(optimizer="adamw_8bit"))
