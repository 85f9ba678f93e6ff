"""The forms on trial: split acts among correct samples, rescue in all-correct groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.method.aepo_terms import surprise_weights
from aepo_fast.method.objective import Objective, build_objective, second_temperature
from aepo_fast.method.tokens import StepContext
from aepo_fast.samples import Completion, Sample
from tests.tiny_run import tiny_config

# Two groups of four: half right, and all right. Each sample has its own log-prob a token.
REWARDS = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
LENGTHS = [3, 2, 1, 4, 2, 5, 1, 3]
LOGPROBS = [-0.5, -0.1, -2.0, -0.2, -0.4, -20.0, -0.4, -1.0]
MEAN_ENTROPY = 0.5


def test_surprise_weights_are_bounded_deviations_that_add_up_to_nothing() -> None:
    surprise = torch.tensor([0.5, 0.7, 0.9, 5.0], dtype=torch.float64)
    weights = surprise_weights(surprise)
    assert weights.sum().abs() < 1e-12
    assert (weights.diff() > 0).all()
    spread = (surprise.var(correction=0) + 0.01).sqrt()
    assert (surprise - surprise.mean()).abs().max() < 2 * spread  # no bound acts here
    torch.testing.assert_close(weights, (surprise - surprise.mean()) / spread)
    assert surprise_weights(torch.tensor([0.3])).tolist() == [0.0]
    alike = surprise_weights(torch.tensor([0.300, 0.301]))
    assert alike.abs().max() < 0.01  # equal up to noise: left alone
    far = surprise_weights(torch.tensor([0.0] * 15 + [30.0]))
    assert far.max() - far.min() < 2.5  # 3.9 without the bound


def objective_of(output: Path, form: Any, temperature: float, policy: Any = "grpo") -> Objective:
    rows = [
        Sample(
            Completion((1, 2), (3,) * length, (logprob,) * length, "stop", 1.0, 0),
            index // 4,
            False,
            reward,
        )
        for index, (reward, length, logprob) in enumerate(
            zip(REWARDS, LENGTHS, LOGPROBS, strict=True)
        )
    ]
    cfg = tiny_config(output, output)
    return build_objective(
        replace(cfg, loss=LossConfig(policy=policy), aepo=AepoConfig(form=form, alpha=0.5)),
        rows,
        torch.zeros(len(rows)),
        range(len(rows)),
        StepContext(temperature, 0.0, 0.0, 0, 0, 1, entropy=MEAN_ENTROPY),
        old=None,
        reference=None,
        generator=torch.Generator(),
    )


def gradients(objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the loss by log-probs and entropies; the entropies of each sample's tokens rise by 0.3."""
    logprob = torch.tensor(LOGPROBS).repeat_interleave(torch.tensor(LENGTHS)).requires_grad_()
    entropy = torch.cat([0.3 * torch.arange(1, n + 1) for n in LENGTHS]).requires_grad_()
    columns = objective.columns
    if objective.sequence_loss is not None:
        sample_of_token = torch.repeat_interleave(torch.tensor(LENGTHS))
        loss, _ = objective.sequence_loss(logprob, entropy, None, sample_of_token, columns)
    else:
        loss, _ = objective.token_loss(logprob, entropy, None, columns)
    found = torch.autograd.grad(loss, [logprob, entropy], allow_unused=True, materialize_grads=True)
    return found[0], found[1]


@pytest.mark.parametrize("policy", ["grpo", "gspo"])
@pytest.mark.parametrize("temperature", [0.8, 1.4])
def test_split_raises_the_less_likely_correct_samples(
    tmp_path: Path, policy: Any, temperature: float
) -> None:
    objective = objective_of(tmp_path, "split", temperature, policy)
    by_logprob, by_entropy = gradients(objective)
    weights = torch.zeros(8)
    weights[[0, 2]] = surprise_weights(torch.tensor([0.5, 2.0]))
    weights[4:] = surprise_weights(torch.tensor([0.4, 8.0, 0.4, 1.0]))  # no token counts beyond 8
    lengths = torch.tensor(LENGTHS)
    expected = -0.5 * (temperature - 1) * weights / (8 * lengths)
    torch.testing.assert_close(by_logprob, expected.repeat_interleave(lengths))
    assert (by_entropy == 0).all()
    assert objective.passive_samples == {1, 3}
    plain = objective_of(tmp_path, "split", 1.0, policy)
    assert plain.passive_samples == frozenset(range(8)) and (gradients(plain)[0] == 0).all()


@pytest.mark.parametrize("policy", ["grpo", "gspo"])
def test_rescue_raises_uncertain_tokens_of_all_correct_groups(tmp_path: Path, policy: Any) -> None:
    objective = objective_of(tmp_path, "rescue", 1.4, policy)
    by_logprob, by_entropy = gradients(objective)
    lengths = torch.tensor(LENGTHS)
    entropy = torch.cat([0.3 * torch.arange(1, n + 1) for n in LENGTHS])
    solved = (torch.arange(8) >= 4).float().repeat_interleave(lengths)
    weight = (1 / (8 * lengths)).repeat_interleave(lengths)
    expected = -0.5 * 0.4 * weight * solved * (entropy > MEAN_ENTROPY)
    torch.testing.assert_close(by_entropy, expected)
    assert (by_logprob == 0).all()
    assert objective.passive_samples == {0, 1, 2, 3}


@pytest.mark.parametrize("form", ["split", "rescue"])
def test_neither_needs_a_second_temperature(form: Any) -> None:
    assert second_temperature(LossConfig(), AepoConfig(form=form), 1.3) is None
