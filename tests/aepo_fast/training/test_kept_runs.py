"""Whole runs that sample from the most likely tokens: the same law in the loss, and resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.method import LossConfig
from aepo_fast.config.sections import (
    CheckpointConfig,
    Config,
    EvalConfig,
    LoraConfig,
    RolloutConfig,
)
from aepo_fast.training.run import train
from tests.aepo_fast.training.test_run import assert_same_end, metrics_of
from tests.tiny_run import copy_until, explained_metrics, tiny_config, with_trainer

KEPT = RolloutConfig(max_new_tokens=6, dtype="float32", top_k=9, top_p=0.9)


def config(model: Path, output: Path, rollout: RolloutConfig = KEPT) -> Config:
    keep = CheckpointConfig(every=1, keep=9)
    return tiny_config(model, output, rollout=rollout, checkpoint=keep, loss=LossConfig())


def test_the_loss_has_the_law_that_was_sampled(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(config(tiny_model_dir, tmp_path / "kept"), eval=EvalConfig(prompts=2, samples=2))
    train(with_trainer(cfg, steps=2))
    _, *lines = metrics_of(cfg)
    assert set(lines[0]) <= explained_metrics() | {"step"}
    for line in lines:
        assert line["sampling/logp_difference/max"] < 1e-5
        assert 7 < line["sampling/kept_tokens"] <= 9  # the tiny model's are about as likely
        assert line["kernel/rows"] == "torch (kept ids)"
        assert 1.9 < line["entropy"] < 2.2  # log 9 = 2.197; log 300 = 5.7

    # The mistake that this is about: the loss over all tokens.
    monkeypatch.setattr("aepo_fast.model.batch.kept_ids", lambda samples, indices: None)
    whole = config(tiny_model_dir, tmp_path / "whole")
    train(with_trainer(whole, steps=1))
    (line,) = metrics_of(whole)
    assert line["sampling/logp_difference/mean"] > 3


def test_a_resumed_run_ends_bit_for_bit_as_one_that_never_stopped(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    # Sampled ahead, so that a checkpoint holds samples.
    rollout = replace(KEPT, steps_ahead=1, dtype="bfloat16")
    straight, resumed = (
        with_trainer(config(tiny_model_dir, tmp_path / name, rollout), steps=3)
        for name in ("straight", "resumed")
    )
    train(straight)
    copy_until(2, straight, resumed)
    train(resumed, resume=True)
    assert_same_end(straight, resumed)


def test_an_adapter_on_the_head_takes_part(tiny_model_dir: Path, tmp_path: Path) -> None:
    cfg = config(tiny_model_dir, tmp_path / "run")
    lora = LoraConfig(rank=4, targets=("q_proj", "lm_head"))
    train(with_trainer(replace(cfg, model=replace(cfg.model, lora=lora)), steps=1))
    (line,) = metrics_of(cfg)
    assert line["sampling/logp_difference/max"] < 1e-5 and line["grad_norm"] > 0


def test_a_bound_that_keeps_the_whole_vocabulary_is_refused(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("aepo_fast.training.assemble.load_model", refuse)
    with pytest.raises(ConfigError, match="rollout.top_k = 900: leaves none of the model's"):
        train(config(tiny_model_dir, tmp_path / "run", replace(KEPT, top_k=900)))
