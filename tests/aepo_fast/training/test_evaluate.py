"""Estimators of the evaluation against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from aepo_fast.config.sections import TrainerConfig
from aepo_fast.training.eval_statistics import (
    ProblemResult,
    clustered_interval,
    compare_problems,
    paired_interval,
    pass_at_k,
)
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


def test_the_paired_interval_covers_at_its_stated_rate() -> None:
    """And is narrower than that of two evaluations of other problems: problems differ a lot."""
    rng = np.random.default_rng(1)
    covered, widths = 0, []
    for _ in range(400):
        chances = rng.beta(2, 2, size=80) * 0.8
        ours = rng.binomial(4, chances + 0.1) / 4
        theirs = rng.binomial(4, chances) / 4
        low, high = paired_interval(list(ours - theirs))
        covered += low <= 0.1 <= high
        apart = [clustered_interval(list(values)) for values in (ours, theirs)]
        widths.append((high - low) / sum(one[1] - one[0] for one in apart))
    assert 0.91 < covered / 400 < 0.98 and np.mean(widths) < 0.8
    assert paired_interval([0.5]) == (-1.0, 1.0)
    # Not cut at 0, where all differences happen to be shares.
    assert paired_interval([0.0, 0.0, 0.0, 1.0])[0] < 0


def test_two_evaluations_are_paired_by_problem() -> None:
    ours = [ProblemResult("a", 4, 2, 0.5), ProblemResult("b", 4, 4, 1.0)]
    theirs = [ProblemResult("b", 8, 4, 0.5), ProblemResult("c", 8, 8, 1.0)]
    theirs.append(ProblemResult("a", 8, 2, 0.25))
    found = compare_problems(ours, theirs, other="x", ks=(1, 2, 4, 8))
    assert found.num_prompts == 2 and found.difference == pytest.approx((0.25 + 0.5) / 2)
    half = 1.96 * np.std([0.25, 0.5], ddof=1) / np.sqrt(2)
    assert found.ci95 == pytest.approx((0.375 - half, 0.375 + half))
    assert list(found.pass_at_k) == [1, 2, 4]  # ours has no 8 samples
    two = [1 - 2 / 12 - (1 - 30 / 56), 1 - (1 - 12 / 56)]
    assert found.pass_at_k[2][0] == pytest.approx(np.mean(two))
    assert "difference to x" in str(found) and "avg@k +0.375" in str(found)
