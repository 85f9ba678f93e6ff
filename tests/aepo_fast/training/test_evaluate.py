"""Estimators of the evaluation against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from aepo_fast.config.sections import TrainerConfig
from aepo_fast.training.evaluate import clustered_interval, pass_at_k
from aepo_fast.training.optim import build_optimizer, guarded_step, learning_rate


@pytest.mark.parametrize("num_correct", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(num_correct: int, k: int) -> None:
    samples = [True] * num_correct + [False] * (6 - num_correct)
    subsets = list(itertools.combinations(samples, k))
    assert pass_at_k(6, num_correct, k) == pytest.approx(
        sum(any(subset) for subset in subsets) / len(subsets)
    )


@pytest.mark.parametrize("k", [0, 7])
def test_pass_at_k_refuses_more_than_the_samples(k: int) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        pass_at_k(6, 3, k)


def test_the_interval_covers_at_its_stated_rate() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        chances = rng.beta(2, 2, size=60)  # prompts differ: samples of one are not independent
        low, high = clustered_interval([rng.binomial(4, chance) / 4 for chance in chances])
        covered += low <= 0.5 <= high
    assert 0.91 < covered / 400 < 0.98
    assert clustered_interval([0.7]) == (0.0, 1.0)
    low, high = clustered_interval([-3.0, -1.0, -2.0])
    assert low < -2.0 < high < 0


def test_learning_rate_schedules() -> None:
    cfg = TrainerConfig(steps=10, lr=1.0, warmup_steps=2, lr_schedule="linear")
    expected = [0.5, 1.0, *(1 - i / 8 for i in range(8))]
    assert [learning_rate(cfg, step) for step in range(10)] == pytest.approx(expected)
    cosine = TrainerConfig(steps=10, lr=1.0, lr_schedule="cosine")
    assert learning_rate(cosine, 0) == 1.0 and learning_rate(cosine, 5) == pytest.approx(0.5)
    assert learning_rate(TrainerConfig(lr=3.0), 99) == 3.0


def test_matrices_decay_and_vectors_do_not() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, TrainerConfig(weight_decay=0.1))
    decayed, plain = optimizer.param_groups
    assert [p.shape for p in decayed["params"]] == [(2, 3)] and decayed["weight_decay"] == 0.1
    assert [p.shape for p in plain["params"]] == [(2,)] and plain["weight_decay"] == 0.0


@pytest.mark.parametrize(("loss", "poison"), [(float("nan"), 1.0), (0.0, float("inf"))])
def test_a_step_that_is_not_finite_leaves_the_weights(loss: float, poison: float) -> None:
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, TrainerConfig(lr=0.1))
    model(torch.ones(1, 3)).sum().mul(poison).backward()
    _, taken = guarded_step(optimizer, loss, max_grad_norm=1.0)
    assert not taken and torch.equal(model.weight, before) and model.weight.grad is None
    model(torch.ones(1, 3)).sum().backward()
    norm, taken = guarded_step(optimizer, 0.0, max_grad_norm=1.0)
    assert taken and norm == pytest.approx((2 * 3 + 2) ** 0.5)
    assert not torch.equal(model.weight, before)
