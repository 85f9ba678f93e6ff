"""Token losses against loops written from the papers, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from aepo_fast.config.method import EntropyMethod, LossConfig
from aepo_fast.method import aepo_terms, policy_losses, regularisers
from aepo_fast.method.controllers import BonusCoefficient

RATIOS = [0.3, 0.79, 0.8, 0.81, 1.0, 1.27, 1.28, 1.29, 2.0, 5.0]
ADVANTAGES = [-2.0, -0.5, 0.0, 0.5, 2.0]


def grid() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every ratio with every advantage: logprob (a leaf), old logprob, advantage."""
    ratio, advantage = torch.cartesian_prod(
        torch.tensor(RATIOS, dtype=torch.float64), torch.tensor(ADVANTAGES, dtype=torch.float64)
    ).unbind(1)
    old = torch.linspace(-9, -0.1, len(ratio), dtype=torch.float64)
    return (old + ratio.log()).requires_grad_(), old, advantage


def terms_of(
    policy: str,
    logprob: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    low: float,
    high: float,
    *,
    dual_clip: float,
) -> policy_losses.TokenTerms:
    """The terms of a loss of the table, called as the trainer calls it."""
    given = {
        "logprob": logprob,
        "old_logprob": old,
        "advantage": advantage,
        "clip_low": low,
        "clip_high": high,
        "dual_clip": dual_clip,
    }
    return policy_losses.POLICY_LOSSES[policy].terms(given, {})


def clip_by_hand(
    ratio: float, advantage: float, low: float, high: float, dual: float
) -> tuple[float, float]:
    """Loss of a token and its derivative by the log-prob (r' = r)."""
    clipped = min(max(ratio, 1 - low), 1 + high)
    value = min(ratio * advantage, clipped * advantage)
    moves = value == ratio * advantage
    if dual and advantage < 0 and value < dual * advantage:
        return -dual * advantage, 0.0
    return -value, -ratio * advantage if moves else 0.0


@pytest.mark.parametrize("dual_clip", [0.0, 3.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28)])
def test_clipped_surrogate_and_its_gradient(low: float, high: float, dual_clip: float) -> None:
    logprob, old, advantage = grid()
    terms = policy_losses.clipped_surrogate(logprob, old, advantage, low, high, dual_clip=dual_clip)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logprob)
    ratios = (logprob - old).exp().tolist()
    for index, (ratio, adv) in enumerate(zip(ratios, advantage.tolist(), strict=True)):
        if any(abs(ratio - edge) < 1e-9 for edge in (1 - low, 1 + high)):
            continue  # the exact boundary has its own test
        loss, slope = clip_by_hand(ratio, adv, low, high, dual_clip)
        assert terms.loss[index].item() == pytest.approx(loss, abs=1e-12)
        assert gradient[index].item() == pytest.approx(slope, abs=1e-12)
        assert terms.clipped_low[index].item() == float(ratio < 1 - low and adv < 0)
        assert terms.clipped_high[index].item() == float(ratio > 1 + high and adv > 0)


@pytest.mark.parametrize("advantage", [-1.5, 1.5])
@pytest.mark.parametrize("side", ["low", "high", "dual"])
def test_the_gradient_at_the_exact_boundary_follows_torch(side: str, advantage: float) -> None:
    # The ratio is the bound to the last bit; the test is empty if it is not.
    bound = {"low": 0.75, "high": 1.5, "dual": 3.0}[side]
    old, adv = torch.zeros(1, dtype=torch.float64), torch.tensor([advantage]).double()
    logprob = torch.tensor([math.log(bound)], dtype=torch.float64, requires_grad=True)
    exact = (logprob - old).exp().item()
    low, high, dual = 0.25, 0.5, 3.0
    low, high = (1 - exact, high) if side == "low" else (low, exact - 1 if side == "high" else high)
    dual = exact if side == "dual" else dual
    assert {"low": 1 - low, "high": 1 + high, "dual": dual}[side] == exact
    ours = policy_losses.clipped_surrogate(logprob, old, adv, low, high, dual_clip=dual).loss
    (gradient,) = torch.autograd.grad(ours.sum(), logprob)
    # On a bound clamp passes its gradient, and both sides of a minimum take half: all of r A.
    # At the dual bound half of it is the constant's; above 1 + high, A > 0 has none at all.
    share = {"low": 1.0, "high": 1.0, "dual": 0.5 if advantage < 0 else 0.0}[side]
    assert gradient.item() == pytest.approx(-share * exact * advantage, abs=1e-12)
    assert ours.item() == pytest.approx(-min(exact, 1 + high if advantage > 0 else 9) * advantage)


def test_cispo_never_loses_a_gradient() -> None:
    logprob, old, advantage = grid()
    terms = policy_losses.cispo(logprob, old, advantage, 0.2, 0.28)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logprob)
    ratio = (logprob - old).detach().exp()
    weight = torch.tensor([min(max(value, 0.8), 1.28) for value in ratio.tolist()]).double()
    torch.testing.assert_close(gradient, -weight * advantage, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(terms.loss.detach(), -weight * advantage * logprob.detach())


def test_sapo_is_a_soft_gate() -> None:
    logprob, old, advantage = grid()
    for taus in ({}, {"tau_pos": 0.5, "tau_neg": 3.0}):
        loss = policy_losses.sapo(logprob, old, advantage, **taus)
        (gradient,) = torch.autograd.grad(loss.sum(), logprob)
        ratios = (logprob - old).exp().tolist()
        for index, (ratio, adv) in enumerate(zip(ratios, advantage.tolist(), strict=True)):
            tau = taus.get("tau_pos", 1.0) if adv >= 0 else taus.get("tau_neg", 1.05)
            sigmoid = 1 / (1 + math.exp(-tau * (ratio - 1)))
            assert loss[index].item() == pytest.approx(-adv * sigmoid * 4 / tau, rel=1e-6)
            slope = -adv * 4 * sigmoid * (1 - sigmoid) * ratio
            assert gradient[index].item() == pytest.approx(slope, rel=1e-6)
    table = policy_losses.POLICY_LOSSES["sapo"]
    assert (table.aggregation, table.own_arguments) == ("sequence_mean", ("tau_pos", "tau_neg"))


@pytest.mark.parametrize("policy", ["grpo", "dr_grpo", "dapo"])
def test_policies_of_the_ppo_family_share_the_surrogate(policy: str) -> None:
    logprob, old, advantage = grid()
    ours = terms_of(policy, logprob, old, advantage, 0.2, 0.28, dual_clip=3.0)
    plain = policy_losses.clipped_surrogate(logprob, old, advantage, 0.2, 0.28, dual_clip=3.0)
    assert torch.equal(ours.loss, plain.loss)


@pytest.mark.parametrize("policy", ["grpo", "cispo", "sapo"])
@pytest.mark.parametrize("gap", [-500.0, 500.0])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("dual_clip", [0.0, 3.0])
def test_huge_log_ratios_stay_finite(
    policy: str, gap: float, advantage: float, dual_clip: float
) -> None:
    logprob = torch.tensor([gap - 600.0], requires_grad=True)
    old, adv = torch.tensor([-600.0]), torch.tensor([advantage])
    terms = terms_of(policy, logprob, old, adv, 0.2, 0.2, dual_clip=dual_clip)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logprob)
    assert terms.loss.isfinite().all() and gradient.isfinite().all()


def test_gspo_is_one_ratio_per_sequence() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 1, 5]
    rows = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    old = -3 * torch.rand(9, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(9, generator=generator, dtype=torch.float64)
    logprob = (old + noise).requires_grad_()
    advantage = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    terms = policy_losses.gspo(logprob, old, advantage[rows], 3e-4, 4e-4, rows)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logprob)
    start = 0
    for row, length in enumerate(lengths):
        mean = sum(noise.tolist()[start : start + length]) / length
        loss, slope = clip_by_hand(math.exp(mean), advantage[row].item(), 3e-4, 4e-4, 0.0)
        assert terms.loss[row].item() == pytest.approx(loss)
        for token in range(start, start + length):
            assert gradient[token].item() == pytest.approx(slope / length)
        start += length


def test_kl_estimators_have_the_expectation_of_the_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = torch.log_softmax(torch.randn(60, generator=generator, dtype=torch.float64), -1)
    near = policy + 0.01 * torch.randn(60, generator=generator, dtype=torch.float64)
    reference = torch.log_softmax(near, -1)
    exact = (policy.exp() * (policy - reference)).sum().item()
    for name, tolerance in (("k1", 1e-12), ("k3", 1e-12), ("k2", 0.05 * exact)):
        value = (policy.exp() * policy_losses.kl_to_reference(policy, reference, name)).sum().item()
        assert value == pytest.approx(exact, abs=tolerance)
    assert (policy_losses.kl_to_reference(policy, reference, "k3") >= 0).all()
    far = policy_losses.kl_to_reference(torch.tensor([-500.0]), torch.tensor([0.0]), "k3")
    assert far.isfinite().all()


def test_resampling_term_is_reinforce_at_ratio_one_and_is_clipped_above() -> None:
    logprob = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    at_one = aepo_terms.resample_token_loss(logprob, logprob.detach(), 0.2, 0.2)
    assert torch.autograd.grad(at_one.loss.sum(), logprob)[0].tolist() == [-1.0, -1.0]
    moved = aepo_terms.resample_token_loss(logprob, logprob.detach() - 0.5, 0.2, 0.2)
    assert torch.autograd.grad(moved.loss.sum(), logprob)[0].tolist() == [0.0, 0.0]
    assert moved.clipped_high.tolist() == [1.0, 1.0]


def test_temperature_ratio_is_clamped_and_has_no_gradient() -> None:
    at_t = torch.tensor([-9.0, -1.0, -0.1], requires_grad=True)
    rho = aepo_terms.temperature_ratio(at_t, torch.tensor([-1.0, -1.2, -9.0]), 3.0)
    assert not rho.requires_grad
    torch.testing.assert_close(rho, torch.tensor([1 / 3, math.exp(0.2), 3.0]))


@pytest.mark.parametrize("baseline", [False, True])
def test_one_pass_weighs_tokens_by_rho(baseline: bool) -> None:
    logprob = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    rho = torch.tensor([0.5, 2.0], dtype=torch.float64)
    terms = aepo_terms.one_pass_token_loss(
        logprob, logprob.detach(), rho, 0.2, 0.2, baseline=baseline
    )
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logprob)
    assert gradient.tolist() == ([0.5, -1.0] if baseline else [-0.5, -2.0])


def test_dcpo_mixes_advantages() -> None:
    advantage, rho = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 3.0])
    mixed = aepo_terms.dcpo_advantage(advantage, rho, torch.tensor([1.0, 0.0]), 0.25)
    assert mixed.tolist() == [0.75 * 1 + 0.25 * 2, -0.75]
    raw = 0.1 / 0.5
    assert aepo_terms.dcpo_mix(-0.7, 0.5, 64) == pytest.approx(raw / (1 + raw))
    assert aepo_terms.dcpo_mix(0.05, 0.0, 64) == pytest.approx(0.05 * 64 / (1 + 0.05 * 64))


def test_entropy_advantage_never_flips_a_sign() -> None:
    advantage = torch.tensor([2.0, -2.0, 0.1, 0.0])
    entropy = torch.tensor([1.0, 9.0, 9.0, 9.0], requires_grad=True)
    shaped = regularisers.entropy_advantage(advantage, entropy, coef=0.4, kappa=2.0)
    assert not shaped.requires_grad
    torch.testing.assert_close(shaped, torch.tensor([2.4, -1.0, 0.15, 0.0]))


def test_selections_pick_the_right_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(50, generator=generator)
    top = regularisers.top_entropy_mask(entropy, 0.2)
    assert set(top.nonzero().flatten().tolist()) == set(entropy.argsort()[-10:].tolist())
    logprob = torch.randn(50, generator=generator) * 3
    advantage = torch.randn(50, generator=generator)
    cov = (logprob - logprob.mean()) * (advantage - advantage.mean())
    kl = regularisers.kl_cov_mask(logprob, advantage, fraction=0.1)
    assert set(kl.nonzero().flatten().tolist()) == set(cov.argsort()[-5:].tolist())
    clip = regularisers.clip_cov_mask(
        logprob, advantage, fraction=0.04, low=1.0, high=5.0, generator=generator
    )
    assert clip.sum() == 2 and ((cov > 1) & (cov < 5))[clip].all()
    for empty in (
        regularisers.top_entropy_mask(torch.zeros(0), 0.2),
        regularisers.kl_cov_mask(torch.zeros(0), torch.zeros(0), fraction=0.1),
        regularisers.clip_cov_mask(torch.zeros(0), torch.zeros(0), fraction=1, low=0, high=1),
    ):
        assert len(empty) == 0


def test_the_adaptive_bonus_acts_only_below_its_target() -> None:
    cfg = LossConfig(
        entropy_method="adaptive_bonus",
        entropy_coef=0.01,
        adaptive_target=0.3,
        adaptive_delta=0.004,
    )
    bonus = BonusCoefficient(cfg)
    assert bonus.value == 0.0
    bonus.update(0.2)
    assert bonus.value == pytest.approx(0.014)
    again = BonusCoefficient(cfg)
    again.load_state_dict(bonus.state_dict())
    for _ in range(5):
        again.update(0.4)
    assert again.value == 0.0 and again.coef == 0.0
    bonus.update(math.nan)  # of a skipped step
    assert bonus.value == pytest.approx(0.014)
    fixed = BonusCoefficient(LossConfig(entropy_method="bonus", entropy_coef=0.01))
    assert fixed.value == 0.01
    assert BonusCoefficient(LossConfig()).value == 0.0


def test_a_resumed_bonus_is_the_configured_one_and_an_adapted_one_the_saved_one() -> None:
    def resumed(before: EntropyMethod, after: EntropyMethod) -> BonusCoefficient:
        old = LossConfig(entropy_method=before, entropy_coef=0.01)
        if before == "adaptive_bonus":
            old = replace(old, adaptive_delta=0.004)
        saved = BonusCoefficient(old)
        saved.update(0.1)
        loaded = BonusCoefficient(LossConfig(entropy_method=after, entropy_coef=0.5))
        loaded.load_state_dict(saved.state_dict())
        assert loaded.entropy == 0.1
        return loaded

    assert resumed("bonus", "bonus").value == 0.5
    assert resumed("adaptive_bonus", "adaptive_bonus").value == pytest.approx(0.014)
    # What the other method left is no starting value.
    assert resumed("bonus", "adaptive_bonus").value == 0.5
    assert resumed("adaptive_bonus", "bonus").value == 0.5


def test_empty_input() -> None:
    empty = torch.zeros(0, requires_grad=True)
    none = torch.zeros(0)
    for terms in (
        policy_losses.clipped_surrogate(empty, none, none, 0.2, 0.2, dual_clip=3.0),
        policy_losses.cispo(empty, none, none, 0.2, 0.2),
        aepo_terms.resample_token_loss(empty, none, 0.2, 0.2),
        aepo_terms.one_pass_token_loss(empty, none, none, 0.2, 0.2, baseline=True),
    ):
        assert torch.autograd.grad(terms.loss.sum(), empty)[0].shape == (0,)
    # A row without tokens between two others: ratio 1, and advantage 0, which no token carries.
    rows, two = torch.tensor([0, 2]), torch.zeros(2)
    sequences = policy_losses.gspo(two, two, torch.ones(2), 0.1, 0.1, rows)
    assert sequences.loss.tolist() == [-1.0, 0.0, -1.0]
    assert len(policy_losses.kl_to_reference(empty, none, "k3")) == 0
