"""Importance correction against its definitions, and that it leaves auxiliary rows alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.config.sections import Config, RolloutConfig
from aepo_fast.method.correction import CORRECTIONS, Correction, SequenceMask, TokenTruncate
from aepo_fast.method.objective import build_objective, needs_old_logprobs
from aepo_fast.method.tokens import StepContext, Tokens
from aepo_fast.samples import Completion, Sample, TokenValues
from tests.tiny_run import tiny_config

# Lowest and highest ratio that keeps its weight.
BOUNDS = {"token_truncate": (0.0, 2.0), "sequence_mask": (0.0, 3.0), "icepop": (0.5, 5.0)}
# nats; equal laws, small and large differences, and ones whose exp overflows
DIFFERENCES = (0.0, 0.01, -0.01, 0.69, 0.7, -0.69, -0.7, 1.2, 1.7, -3.0, 60.0, -60.0, 1e4, -1e4)


def weights_of(
    correction: Correction, logprob: torch.Tensor, sampler: torch.Tensor
) -> torch.Tensor:
    """Weights of tokens before the first update, when the current policy is the old one."""
    entropy, column = torch.zeros_like(logprob), {"sampler_logprob": sampler}
    return correction.weights(Tokens(logprob, logprob, entropy, None, column))


@pytest.mark.parametrize("mode", ["token_truncate", "icepop"])
def test_token_weights_are_their_definition(mode: str) -> None:
    low, high = BOUNDS[mode]
    sampler = torch.linspace(-6, -0.1, len(DIFFERENCES))
    logprob = (sampler + torch.tensor(DIFFERENCES)).requires_grad_()
    found = weights_of(CORRECTIONS[mode](), logprob, sampler)
    assert not found.requires_grad
    for weight, difference in zip(found.tolist(), (logprob - sampler).tolist(), strict=True):
        ratio = math.exp(min(difference, 700.0))
        truth = min(ratio, high) if mode == "token_truncate" else ratio * (low <= ratio <= high)
        assert weight == pytest.approx(truth, rel=1e-6, abs=1e-8)


def test_sequence_weights_are_products_over_rows_within_the_bounds() -> None:
    rows = [[0.1, 0.2], [], [0.5] * 3, [-1.0], [-2.0], [0.01] * 100, [200.0] * 50, [-200.0, 201.0]]
    lengths = torch.tensor([len(row) for row in rows])
    difference = torch.tensor([value for row in rows for value in row])
    sampler = torch.full_like(difference, -2.0)
    found = SequenceMask(0.2, 3.0).of_samples(sampler + difference, sampler, lengths)
    expected = []
    for row in rows:
        total = sum(row)
        inside = math.log(0.2) <= total <= math.log(3.0)
        expected += [math.exp(total) if inside else 0.0] * len(row)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)


def test_correction_of_nothing() -> None:
    empty = torch.zeros(0)
    for mode in ("token_truncate", "icepop"):
        assert weights_of(CORRECTIONS[mode](), empty, empty).shape == (0,)
    none = torch.zeros(0, dtype=torch.long)
    assert SequenceMask().of_samples(empty, empty, none).shape == (0,)


def test_the_corrected_gradient_is_that_of_samples_of_the_trainer() -> None:
    """Summed over every action under the sampler's law, the weight restores the trainer's."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    sampler = (logits.detach() + 0.3 * torch.randn(7, generator=generator)).log_softmax(0)
    reward = torch.arange(7) % 2
    logprob = logits.log_softmax(0)
    weight = weights_of(TokenTruncate(high=100.0), logprob, sampler)
    (corrected,) = torch.autograd.grad(
        (sampler.exp() * weight * reward * logprob).sum(), logits, retain_graph=True
    )
    (exact,) = torch.autograd.grad((logprob.exp() * reward).sum(), logits)
    torch.testing.assert_close(corrected, exact, atol=1e-12, rtol=1e-12)


def sampled_row(index: int, length: int, is_aux: bool, difference: float) -> Sample:
    logprobs = tuple(-1.0 - difference for _ in range(length))
    completion = Completion((1,), (2,) * length, logprobs, "stop", 1.3 if is_aux else 1.0, 0)
    return Sample(completion, index // 2, is_aux, float(index % 2 == 0))


@pytest.mark.parametrize(
    ("policy", "mode"),
    [
        ("grpo", "token_truncate"),
        ("grpo", "sequence_mask"),
        ("grpo", "icepop"),
        ("gspo", "sequence_mask"),
    ],
)
def test_main_rows_are_weighted_and_auxiliary_rows_never(
    tmp_path: Path, policy: str, mode: str
) -> None:
    shifts = (0.05, -0.05, 0.2, 9.0, 0.3, 9.0)  # trainer's log-prob minus the sampler's
    lengths = (3, 1, 4, 2, 5, 2)
    rows = [
        sampled_row(index, length, index >= 4, shift)
        for index, (length, shift) in enumerate(zip(lengths, shifts, strict=True))
    ]
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 0.0])
    logprob = torch.full((sum(lengths),), -1.0).requires_grad_()
    sample_of_token = torch.repeat_interleave(torch.tensor(lengths))

    def gradient(correction: str) -> torch.Tensor:
        loss = LossConfig(policy=policy, correction=correction)  # type: ignore[arg-type]
        cfg = replace(
            tiny_config(tmp_path, tmp_path),
            loss=loss,
            aepo=AepoConfig(controller="published", alpha=0.5),
        )
        assert needs_old_logprobs(loss, 1) == (correction == "sequence_mask")
        known = TokenValues(logprob.detach(), torch.zeros(len(logprob)), None)
        objective = build_objective(
            cfg,
            rows,
            advantages,
            range(len(rows)),
            StepContext(1.3, 0.0, 0.0, 2, 1, 1),
            old=known if correction == "sequence_mask" else None,
            reference=None,
            generator=torch.Generator(),
        )
        entropy = torch.zeros(len(logprob))
        if objective.sequence_loss is not None:
            total, _ = objective.sequence_loss(
                logprob, entropy, None, sample_of_token, objective.columns
            )
        else:
            total, _ = objective.token_loss(logprob, entropy, None, objective.columns)
        return torch.autograd.grad(total, logprob)[0]

    plain, weighted = gradient("off"), gradient(mode)
    aux = sample_of_token >= 4
    assert plain[aux].abs().sum() > 0
    torch.testing.assert_close(weighted[aux], plain[aux], rtol=0, atol=0)
    for index in range(4):
        tokens = sample_of_token == index
        shift = shifts[index] * (lengths[index] if mode == "sequence_mask" else 1)
        low, high = BOUNDS[mode]
        weight = math.exp(shift)
        if mode == "token_truncate":
            weight = min(weight, high)
        elif not low <= weight <= high:
            weight = 0.0
        torch.testing.assert_close(weighted[tokens], weight * plain[tokens], rtol=1e-5, atol=1e-8)


def test_the_default_depends_on_the_sampler(tmp_path: Path) -> None:
    def resolved(loss: LossConfig, **rollout: object) -> Config:
        cfg = tiny_config(tmp_path, tmp_path)
        return replace(cfg, loss=loss, rollout=RolloutConfig(**rollout))  # type: ignore[arg-type]

    assert resolved(LossConfig()).loss.correction == "off"
    with_vllm = resolved(LossConfig(), backend="vllm").loss
    assert (with_vllm.correction, with_vllm.correction_high) == ("token_truncate", 2.0)
    assert resolved(LossConfig(), steps_ahead=1).loss.correction == "token_truncate"
    assert resolved(LossConfig(policy="gspo"), backend="vllm").loss.correction == "off"
    kept = resolved(LossConfig(correction="icepop", correction_high=4.0), backend="vllm").loss
    assert (kept.correction, kept.correction_low, kept.correction_high) == ("icepop", 0.5, 4.0)
    with pytest.raises(ConfigError, match="rollout.steps_ahead = 1: samples of older weights"):
        resolved(LossConfig(correction="off"), steps_ahead=1)


def test_bounds_without_1_are_refused() -> None:
    with pytest.raises(ConfigError, match="must contain 1"):
        LossConfig(correction="icepop", correction_low=1.5)


@pytest.mark.parametrize("mode", ["token_truncate", "icepop"])
def test_weights_of_tokens_are_refused_where_sequences_have_them(mode: str) -> None:
    with pytest.raises(ConfigError, match=f"loss.correction = '{mode}'.*gspo"):
        LossConfig(policy="gspo", correction=mode)  # type: ignore[arg-type]
