"""The canary: passes with the trainer's weights, whoever samples, and with no others."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from aepo_fast.config.sections import TrainerConfig
from aepo_fast.model.policy import Policy
from aepo_fast.rollout.canary import Canary, StaleWeightsError
from aepo_fast.rollout.hf import HfRollout
from aepo_fast.samples import Completion, Sample
from aepo_fast.training.step_metrics import sampling_metrics
from tests.tiny_run import a_machine

PROMPTS = [(5, 6, 7), (9,), (11, 12, 13, 14)]


@pytest.fixture
def model(tiny_model_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


def parts(model: PreTrainedModel, dtype: torch.dtype) -> tuple[HfRollout, Policy]:
    # In another dtype, the engine holds weights of its own, as vLLM does.
    engine = HfRollout(model, a_machine(compute=dtype), eos_ids=(), batch_rows=8)
    return engine, Policy(model, a_machine(), TrainerConfig())


def nudge(model: PreTrainedModel, size: float) -> None:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            parameter += size * parameter.abs().mean() * noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_passes_while_the_engine_has_the_trainers_weights(
    model: PreTrainedModel, dtype: torch.dtype
) -> None:
    engine, policy = parts(model, dtype)
    canary = Canary(engine, policy, PROMPTS)
    assert 0 <= canary.fresh < 0.02
    assert canary.check() == canary.check() <= canary.limit  # the same samples every time
    nudge(model, 0.3)
    engine.sync_weights(model, 1)
    assert canary.check() <= canary.limit


def test_a_skipped_sync_is_caught_with_both_values(model: PreTrainedModel) -> None:
    engine, policy = parts(model, torch.bfloat16)
    canary = Canary(engine, policy, PROMPTS)
    nudge(model, 0.3)
    with pytest.raises(StaleWeightsError, match=rf"version 0: .*{canary.limit:.4f} is allowed"):
        canary.check()


def test_a_difference_that_is_no_number_does_not_pass(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, policy = parts(model, torch.float32)
    canary = Canary(engine, policy, PROMPTS)
    monkeypatch.setattr(canary, "difference", lambda draw=0: float("nan"))
    with pytest.raises(StaleWeightsError, match="nan"):
        canary.check()


def test_one_unlucky_draw_does_not_stop_a_run(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, policy = parts(model, torch.bfloat16)
    canary = Canary(engine, policy, PROMPTS)
    fresh = canary.fresh
    monkeypatch.setattr(canary, "difference", lambda draw=0: fresh * (1.7 if draw == 0 else 1.1))
    assert canary.check() == pytest.approx(1.25 * fresh)
    monkeypatch.setattr(canary, "difference", lambda draw=0: 1.7 * fresh + 1e-3)
    with pytest.raises(StaleWeightsError):
        canary.check()


def test_sampling_metrics_are_those_of_the_chosen_rows() -> None:
    def sample(logprobs: tuple[float, ...]) -> Sample:
        ids = tuple(range(len(logprobs)))
        return Sample(Completion((1,), ids, logprobs, "stop", 1.0, 0), 0, False, 1.0)

    samples = [sample((-1.0, -2.0)), sample((-5.0,)), sample((-0.5,))]
    trainer = torch.tensor([-1.1, -2.0, 100.0, -0.3])
    metrics = sampling_metrics(trainer, samples, [0, 2], version=3)
    assert metrics["sampling/logp_difference/mean"] == pytest.approx(0.1)
    assert metrics["sampling/logp_difference/max"] == pytest.approx(0.2)
    expected = sum(math.expm1(d) - d for d in (-0.1, 0.0, 0.2)) / 3
    assert metrics["sampling/mismatch_kl"] == pytest.approx(expected, rel=1e-4)
    assert metrics["sampling/version_lag"] == 3
    assert sampling_metrics(trainer, samples, [], version=3) == {}
