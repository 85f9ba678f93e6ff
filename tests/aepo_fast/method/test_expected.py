"""The expected form: the one-pass term summed over the vocabulary, against float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.method.aepo_terms import expected_token_loss, one_pass_token_loss, temperature_ratio
from aepo_fast.method.objective import Objective, build_objective, second_temperature
from aepo_fast.method.policy_losses import gspo
from aepo_fast.method.tokens import StepContext
from aepo_fast.samples import Completion, Sample, TokenValues
from aepo_kernels import linear_token_loss
from tests.tiny_run import tiny_config

V = 50
TEMPERATURES = [0.6, 0.9, 1.01, 1.3, 2.0, 4.0]


@pytest.fixture
def logits() -> torch.Tensor:
    return 2 * torch.randn(V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def loss_at(logits: torch.Tensor, temperature: float, token: int, weight: float) -> torch.Tensor:
    """The term at one state, named by one of its tokens."""
    logprob = torch.log_softmax(logits, -1)[token]
    second = torch.log_softmax(logits / temperature, -1)[token]
    return expected_token_loss(logprob, second, temperature, torch.tensor(weight).double())


def potential(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """F_T = T lse(z / T) - lse(z)."""
    return temperature * (logits / temperature).logsumexp(-1) - logits.logsumexp(-1)


def uphill(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """pi_T - pi: the gradient of F_T by the logits, and of -F_T its negative."""
    return torch.softmax(logits / temperature, -1) - torch.softmax(logits, -1)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_value_and_gradient_are_those_of_the_potential(
    logits: torch.Tensor, temperature: float
) -> None:
    alpha = 0.25
    for token in (0, 7, V - 1):  # whichever token names the state
        leaf = logits.clone().requires_grad_()
        loss = loss_at(leaf, temperature, token, alpha)
        torch.testing.assert_close(
            loss.detach(), -alpha * potential(logits, temperature), atol=1e-12, rtol=0
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
        exact = -alpha * uphill(logits, temperature)
        torch.testing.assert_close(gradient, exact, atol=1e-12, rtol=0)
    step = 1e-5
    for token in (0, 7):
        shift = torch.zeros(V, dtype=torch.float64)
        shift[token] = step
        slope = potential(logits + shift, temperature) - potential(logits - shift, temperature)
        assert (slope / (2 * step)).item() == pytest.approx(
            uphill(logits, temperature)[token].item(), abs=1e-9
        )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_potential_is_the_integral_of_the_tempered_entropies(
    logits: torch.Tensor, temperature: float
) -> None:
    nodes = torch.linspace(1, temperature, 2001, dtype=torch.float64)
    logprob = torch.log_softmax(logits / nodes[:, None], -1)
    entropy = -(logprob.exp() * logprob).sum(-1)
    integral = torch.trapezoid(entropy, nodes).item()
    assert potential(logits, temperature).item() == pytest.approx(integral, rel=1e-5)
    if temperature == 1.01:
        assert integral == pytest.approx(0.01 * entropy[0].item(), rel=0.02)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_it_is_the_mean_of_the_one_pass_term_with_its_baseline(
    logits: torch.Tensor, temperature: float
) -> None:
    logprob = torch.log_softmax(logits, -1)
    rho = temperature_ratio(torch.log_softmax(logits / temperature, -1), logprob, 1e9)
    wanted = -uphill(logits, temperature)

    def one_pass(law: torch.Tensor) -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        lp = torch.log_softmax(leaf, -1)
        loss = one_pass_token_loss(lp, lp.detach(), rho, 0.2, 0.2, baseline=True).loss
        return torch.autograd.grad((law * loss).sum(), leaf)[0]

    torch.testing.assert_close(one_pass(logprob.exp()), wanted, atol=1e-12, rtol=0)

    draws = 200_000
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(logprob.exp(), draws, replacement=True, generator=generator)
    sampled = one_pass(torch.bincount(drawn, minlength=V).double() / draws)
    # A draw a gives -(rho_a - 1) (e_a - pi): by the logit j a mean and a square, exactly.
    law, weight = logprob.exp(), rho - 1
    squares = law * weight.square() * (1 - 2 * law) + law.square() * (law * weight**2).sum()
    error = ((squares - wanted.square()) / draws).sqrt()
    assert ((sampled - wanted).abs() < 5 * error).all()
    assert ((sampled - wanted) / error).square().mean() < 2


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_extreme_logits_stay_finite(temperature: float) -> None:
    base = torch.tensor([200.0, -200.0, 0.0, 199.0, -200.0])
    for dtype in (torch.float32, torch.float64):
        for shift in (-200.0, 0.0, 200.0):
            leaf = (base.to(dtype) + shift).requires_grad_()
            for token in range(5):
                loss = loss_at(leaf, temperature, token, 0.5)
                (gradient,) = torch.autograd.grad(loss, leaf)
                assert torch.isfinite(loss) and torch.isfinite(gradient).all()
                torch.testing.assert_close(
                    gradient, -0.5 * uphill(leaf.detach(), temperature), atol=1e-5, rtol=1e-5
                )


@pytest.mark.parametrize("temperature", [0.8, 1.3, 2.0])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float64), ("auto", torch.float32)]
)
def test_gradients_through_the_head_are_those_of_materialised_logits(
    backend: str, dtype: torch.dtype, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(37, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(301, 16, generator=generator, dtype=torch.float64)
    targets = torch.randint(301, (37,), generator=generator)
    share = torch.rand(37, generator=generator, dtype=torch.float64)
    share[::5] = 0

    def gradients(kind: torch.dtype, fused: bool) -> list[torch.Tensor]:
        h, w = (x.to(kind, copy=True).requires_grad_() for x in (hidden, weight))
        if fused:

            def token_loss(logprob, entropy, second, alpha):
                return expected_token_loss(logprob, second, temperature, alpha).sum()

            loss = linear_token_loss(
                h,
                w,
                targets,
                token_loss,
                share.to(kind),
                second_temperature=temperature,
                backend=backend,
            ).loss
        else:
            loss = -(share.to(kind) * potential(h @ w.T, temperature)).sum()
        loss.backward()
        assert h.grad is not None and w.grad is not None
        return [loss.detach().double(), h.grad.double(), w.grad.double()]

    truth, found = gradients(torch.float64, False), gradients(dtype, True)
    plain = gradients(dtype, False)
    for exact, ours, theirs in zip(truth, found, plain, strict=True):
        floor = 1e-12 if dtype == torch.float64 else 1e-6
        allowed = 2 * (theirs - exact).abs().max() + floor * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed
    assert (found[1][::5] == 0).all()  # no weight, no gradient


# Rows by reward, sampler's log-prob shift and length; groups of four.
REWARDS = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
LENGTHS = [3, 2, 1, 4, 2, 5, 1, 3]


def some_rows(shift: float) -> list[Sample]:
    return [
        Sample(
            Completion((1, 2), (3,) * length, (-2.0 - shift,) * length, "stop", 1.0, 0),
            index // 4,
            False,
            reward,
        )
        for index, (reward, length) in enumerate(zip(REWARDS, LENGTHS, strict=True))
    ]


def objective_of(
    output: Path, loss: LossConfig, aepo: AepoConfig, temperature: float, **inputs: Any
) -> Objective:
    rows = some_rows(inputs.pop("shift", 0.0))
    return build_objective(
        replace(tiny_config(output, output), loss=loss, aepo=aepo),
        rows,
        torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0]),
        range(len(rows)),
        StepContext(temperature, 0.0, 0.0, 0, 0, 1),
        reference=None,
        generator=torch.Generator(),
        **{"old": None, **inputs},
    )


@pytest.mark.parametrize(
    ("policy", "correction"),
    [
        *itertools.product(["grpo", "dapo"], ["off", "token_truncate", "sequence_mask"]),
        *itertools.product(["gspo"], ["off", "sequence_mask"]),
    ],
)
def test_correct_samples_get_the_term_weighed_by_ratio_and_correction(
    tmp_path: Path, policy: Any, correction: Any
) -> None:
    temperature, alpha, shift = 1.4, 0.3, 0.2
    generator = torch.Generator().manual_seed(3)
    total = sum(LENGTHS)
    scored = TokenValues(torch.full((total,), -2.0), torch.ones(total), torch.full((total,), -1.8))
    moved = torch.tensor([-1.0, -0.1, 0.0, 0.1, 1.0])  # log-ratios within and beyond the clip
    logprob = (scored.logprob + moved[torch.randint(5, (total,), generator=generator)])[:total]
    second = -1.5 - torch.rand(total, generator=generator)
    loss = LossConfig(policy=policy, correction=correction)
    on = AepoConfig(form="expected", alpha=alpha)
    sample_of_token = torch.repeat_interleave(torch.tensor(LENGTHS))

    def gradients(aepo: AepoConfig) -> tuple[torch.Tensor, ...]:
        objective = objective_of(tmp_path, loss, aepo, temperature, old=scored, shift=shift)
        lp, at_t = logprob.clone().requires_grad_(), second.clone().requires_grad_()
        given = at_t if objective.second_temperature else None
        columns, entropy = objective.columns, torch.ones(total)
        if objective.sequence_loss is not None:
            value, _ = objective.sequence_loss(lp, entropy, given, sample_of_token, columns)
        else:
            value, _ = objective.token_loss(lp, entropy, given, columns)
        found = torch.autograd.grad(value, [lp, at_t], allow_unused=True)
        zero = torch.zeros(total)
        return (columns["weight"], *(zero if grad is None else grad for grad in found))

    _, without, none = gradients(AepoConfig(enabled=False))
    weight, by_logprob, by_second = gradients(on)
    assert (none == 0).all()
    assert second_temperature(loss, on, temperature) == temperature
    positive = torch.tensor(REWARDS).repeat_interleave(torch.tensor(LENGTHS))
    low, high = (0.2, 0.2) if policy == "gspo" else (loss.clip_low, loss.clip_high)
    assert low and high
    ratio = (logprob - scored.logprob).exp().clamp(1 - low, 1 + high)
    corrections = {
        "off": torch.ones(total),
        "token_truncate": torch.full((total,), shift).exp(),
        # The bound is 3: of a whole row, and none goes beyond it here.
        "sequence_mask": (shift * torch.tensor(LENGTHS)).exp()[sample_of_token],
    }
    expected = alpha * weight * positive * ratio * corrections[correction]
    assert (expected > 0).any()
    torch.testing.assert_close(by_second, temperature * expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(by_logprob - without, -expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["lift", "expected"])
@pytest.mark.parametrize("policy", ["grpo", "gspo"])
def test_rows_are_passive_where_neither_advantage_nor_the_term_acts(
    tmp_path: Path, policy: Any, form: Any
) -> None:
    loss, aepo = LossConfig(policy=policy), AepoConfig(form=form)
    hot, plain = (objective_of(tmp_path, loss, aepo, t) for t in (1.2, 1.0))
    assert hot.second_temperature == 1.2
    assert hot.passive_samples == frozenset()  # rows of the all-correct group carry the term
    assert plain.second_temperature is None  # the term is zero at T = 1
    assert plain.passive_samples == {4, 5, 6, 7}
    off = objective_of(tmp_path, loss, AepoConfig(enabled=False), 1.2)
    assert (off.second_temperature, off.passive_samples) == (None, plain.passive_samples)
    above = objective_of(tmp_path, loss, replace(aepo, reward_threshold=2.0), 1.2)
    assert above.passive_samples == plain.passive_samples  # nothing counts as correct


def test_the_second_temperature_of_each_form() -> None:
    loss = LossConfig()
    silent = {"lift": None, "expected": None, "resample": None}
    for form, at_one in {**silent, "one_pass": 1.0, "dcpo": 1.0}.items():
        aepo = AepoConfig(form=form)
        assert second_temperature(loss, aepo, 1.0) == at_one
        assert second_temperature(loss, aepo, 1.3) == (None if form == "resample" else 1.3)
        assert second_temperature(loss, replace(aepo, enabled=False), 1.3) is None


def test_at_t_1_the_sequence_loss_is_plain_gspo(tmp_path: Path) -> None:
    objective = objective_of(tmp_path, LossConfig(policy="gspo"), AepoConfig(form="expected"), 1.0)
    assert objective.sequence_loss is not None
    total = sum(LENGTHS)
    sample_of_token = torch.repeat_interleave(torch.tensor(LENGTHS))
    logprob = torch.full((total,), -2.0).requires_grad_()
    value, _ = objective.sequence_loss(
        logprob, torch.ones(total), None, sample_of_token, objective.columns
    )
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    terms = gspo(logprob, logprob.detach(), advantage[sample_of_token], 3e-4, 4e-4, sample_of_token)
    found, wanted = (
        torch.autograd.grad(x, logprob, retain_graph=True)[0] for x in (value, terms.loss.mean())
    )
    torch.testing.assert_close(found, wanted)
