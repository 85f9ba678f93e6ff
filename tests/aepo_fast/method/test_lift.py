"""The form lift: it raises what is likelier at T, and pushes nothing of a correct sample down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.method.aepo_terms import lift_token_loss, one_pass_token_loss, temperature_ratio
from aepo_fast.samples import TokenValues
from tests.aepo_fast.method.test_expected import LENGTHS, REWARDS, objective_of

TEMPERATURES = [0.6, 0.95, 1.05, 1.3, 2.0]


def laws() -> list[torch.Tensor]:
    """Logits of policies from uniform to collapsed, and with extreme values."""
    generator = torch.Generator().manual_seed(0)
    drawn = [s * torch.randn(50, generator=generator).double() for s in (0.1, 1.0, 3.0, 10.0)]
    sharp = torch.tensor([200.0, 199.0, 0.0, -200.0]).double()
    return [
        *drawn,
        sharp,
        torch.tensor([6.0, 0.0, 0.0]).double(),
        torch.tensor([1.0, 0.0]).double(),
    ]


def ratio(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    first, second = (torch.log_softmax(logits / t, -1) for t in (1.0, temperature))
    return temperature_ratio(second, first, rho_clip=1e30)


def ascent(logits: torch.Tensor, temperature: float, right: torch.Tensor) -> torch.Tensor:
    """What descending the loss does to the logits on average over a ~ pi, by autograd."""
    leaf = logits.clone().requires_grad_()
    logprob = torch.log_softmax(leaf, -1)
    loss = lift_token_loss(logprob, logprob.detach(), ratio(logits, temperature), 0.2, 0.2).loss
    (gradient,) = torch.autograd.grad((logprob.detach().exp() * right * loss).sum(), leaf)
    return -gradient


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_on_average_it_is_the_part_that_rises_less_its_share_of_pi(temperature: float) -> None:
    for logits in laws():
        pi, at_t = (torch.softmax(logits / t, -1) for t in (1.0, temperature))
        rises = (at_t - pi).clamp(min=0)
        found = ascent(logits, temperature, torch.ones_like(logits))
        torch.testing.assert_close(found, rises - rises.sum() * pi, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_where_all_is_right_it_moves_the_entropy_as_t_says(temperature: float) -> None:
    for logits in laws():
        leaf = logits.clone().requires_grad_()
        logprob = torch.log_softmax(leaf, -1)
        (slope,) = torch.autograd.grad(-(logprob.exp() * logprob).sum(), leaf)
        change = (slope * ascent(logits, temperature, torch.ones_like(logits))).sum().item()
        assert change * (temperature - 1) > 0
    uniform = torch.zeros(5).double()
    assert ascent(uniform, temperature, torch.ones(5)).abs().max() < 1e-15


def test_a_single_right_action_is_never_pushed_down() -> None:
    right = torch.tensor([1.0, 0.0, 0.0]).double()
    likely, rare = torch.tensor([2.0, 0.5, 0.0]).double(), torch.tensor([-2.0, 0.5, 0.0]).double()
    assert (ascent(likely, 1.5, right) == 0).all()
    assert ascent(rare, 1.5, right)[0] > 0
    leaf = likely.clone().requires_grad_()
    logprob = torch.log_softmax(leaf, -1)
    loss = one_pass_token_loss(
        logprob, logprob.detach(), ratio(likely, 1.5), 0.2, 0.2, baseline=True
    ).loss
    (gradient,) = torch.autograd.grad((logprob.detach().exp() * right * loss).sum(), leaf)
    assert gradient[0] > 0  # descent lowers it


@pytest.mark.parametrize("policy", ["grpo", "dapo", "gspo"])
@pytest.mark.parametrize("updated", [False, True])
def test_only_tokens_of_correct_samples_are_lifted(
    tmp_path: Path, policy: Any, updated: bool
) -> None:
    alpha, temperature = 0.3, 1.4
    generator = torch.Generator().manual_seed(3)
    total, sample_of_token = sum(LENGTHS), torch.repeat_interleave(torch.tensor(LENGTHS))
    before = -3 * torch.rand(total, generator=generator)
    at_t = before + torch.randn(total, generator=generator)  # rho below and above 1, and clamped
    old = TokenValues(before, torch.ones(total), at_t) if updated else None
    # Log-ratios within and beyond the clip.
    moved = torch.tensor([-1.0, -0.1, 0.0, 0.1, 1.0])[
        torch.randint(5, (total,), generator=generator)
    ]
    now = before + moved if updated else before
    loss = LossConfig(policy=policy)

    def gradient(aepo: AepoConfig) -> tuple[torch.Tensor, torch.Tensor]:
        objective = objective_of(tmp_path, loss, aepo, temperature, old=old)
        lp, second = now.clone().requires_grad_(), (now + 0.5).requires_grad_()
        given = (second if updated else at_t) if objective.second_temperature else None
        columns, entropy = objective.columns, torch.ones(total)
        if objective.sequence_loss is not None:
            value, _ = objective.sequence_loss(lp, entropy, given, sample_of_token, columns)
        else:
            value, _ = objective.token_loss(lp, entropy, given, columns)
        return torch.autograd.grad(value, lp)[0], columns["weight"]

    found, weight = gradient(AepoConfig(form="lift", alpha=alpha))
    without, _ = gradient(AepoConfig(enabled=False))
    rho = (at_t - before).exp().clamp(1 / 3, 3)
    high = 0.2 if policy == "gspo" else loss.clip_high
    assert high
    r = (now - before).exp()
    lifted = (rho - 1).clamp(min=0) * r * (r <= 1 + high)
    positive = torch.tensor(REWARDS).repeat_interleave(torch.tensor(LENGTHS))
    wanted = -alpha * weight * positive * lifted
    assert (wanted < 0).any()
    assert (wanted <= 0).all()
    torch.testing.assert_close(found - without, wanted, rtol=1e-4, atol=1e-6)


def test_empty_input() -> None:
    empty, none = torch.zeros(0, requires_grad=True), torch.zeros(0)
    loss = lift_token_loss(empty, none, none, 0.2, 0.2).loss
    assert torch.autograd.grad(loss.sum(), empty)[0].shape == (0,)
