"""Method test 8: the controller holds the entropy of a toy policy where GRPO lets it collapse."""

from __future__ import annotations

import pytest
import torch

from aepo_fast.advantages import group_advantages
from aepo_fast.aepo_terms import one_pass_token_loss, temperature_ratio
from aepo_fast.config import AepoConfig
from aepo_fast.entropy_control import EntropyController
from aepo_fast.losses import clipped_surrogate

STATES, ACTIONS, CORRECT, GROUP = 12, 32, 8, 8
STEPS = 400


def closed_loop(aepo: AepoConfig, *, lr: float = 0.3, seed: int = 0) -> tuple[float, float]:
    """Mean entropy and mean reward over the last fifth of a run.

    One softmax over ACTIONS per state. The first CORRECT actions earn 1 in nine cases of ten, so
    that groups keep their spread and GRPO keeps moving, as it does with a noisy verifier.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(STATES, ACTIONS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=lr)
    controller = EntropyController(aepo)
    groups = torch.arange(STATES).repeat_interleave(GROUP)
    entropies, rewards = [], []
    for _ in range(STEPS):
        temperature = controller.temperature()
        log_policy = torch.log_softmax(logits, -1)
        policy = log_policy.exp().detach()
        actions = torch.multinomial(policy, GROUP, replacement=True, generator=generator)
        luck = torch.rand(STATES, GROUP, generator=generator) < 0.9
        reward = ((actions < CORRECT) & luck).double().flatten()
        advantage = group_advantages(reward, groups, "group_norm").double()
        logprob = log_policy.gather(1, actions).flatten()
        old = logprob.detach()
        loss = clipped_surrogate(logprob, old, advantage, 0.2, 0.2).loss
        if aepo.enabled:
            tempered = torch.log_softmax(logits.detach() / temperature, -1)
            second = tempered.gather(1, actions).flatten()
            rho = temperature_ratio(second, old, aepo.rho_clip)
            extra = one_pass_token_loss(logprob, old, rho, 0.2, 0.2, baseline=aepo.baseline)
            loss = loss + aepo.alpha * (reward >= aepo.reward_threshold) * extra.loss
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        entropy = -(policy * log_policy.detach()).sum(-1).mean().item()
        controller.update(entropy)
        entropies.append(entropy)
        rewards.append(reward.mean().item())
    late = STEPS // 5
    return sum(entropies[-late:]) / late, sum(rewards[-late:]) / late


def test_plain_grpo_collapses() -> None:
    entropy, reward = closed_loop(AepoConfig(enabled=False))
    assert entropy < 0.2
    assert reward > 0.85


@pytest.mark.parametrize("target", [0.25, 0.5, 0.75, 1.0])
def test_the_entropy_is_held_within_five_percent(target: float) -> None:
    cfg = AepoConfig(
        form="one_pass",
        baseline=True,
        entropy_target=target,
        alpha=1.0,
        gain=2.0,
        integral_gain=0.1,
        temperature_min=0.5,
        temperature_max=3.0,
    )
    entropy, reward = closed_loop(cfg)
    assert entropy == pytest.approx(target, rel=0.05)
    assert reward > 0.85
