"""Method test 8: the controller holds the entropy of a toy policy where GRPO lets it collapse."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from aepo_fast.advantages import group_advantages
from aepo_fast.aepo_terms import one_pass_token_loss, resample_token_loss, temperature_ratio
from aepo_fast.config import AepoConfig
from aepo_fast.entropy_control import EntropyController
from aepo_fast.losses import clipped_surrogate

STATES, ACTIONS, CORRECT, GROUP = 24, 32, 8, 16
STEPS = 600


def closed_loop(
    aepo: AepoConfig, *, lr: float = 0.2, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy and reward of each step over the last fifth of a run.

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
        actions, reward = sample(policy, generator)
        advantage = group_advantages(reward, groups, "group_norm").double()
        logprob = log_policy.gather(1, actions).flatten()
        old = logprob.detach()
        loss = clipped_surrogate(logprob, old, advantage, 0.2, 0.2).loss
        tempered = torch.log_softmax(logits.detach() / temperature, -1)
        if aepo.enabled and aepo.form == "resample":
            drawn, found = sample(tempered.exp(), generator)
            again = log_policy.gather(1, drawn).flatten()
            extra = resample_token_loss(again, again.detach(), 0.2, 0.2)
            loss = loss + aepo.alpha * (found >= aepo.reward_threshold) * extra.loss
        if aepo.enabled and aepo.form == "one_pass":
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
    return torch.tensor(entropies[-late:]), torch.tensor(rewards[-late:])


def sample(law: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """GROUP actions per state [STATES, GROUP] from `law`, and their rewards, flat."""
    actions = torch.multinomial(law, GROUP, replacement=True, generator=generator)
    luck = torch.rand(STATES, GROUP, generator=generator) < 0.9
    return actions, ((actions < CORRECT) & luck).double().flatten()


def test_8_plain_grpo_collapses() -> None:
    entropy, reward = closed_loop(AepoConfig(enabled=False))
    assert entropy.mean() < 0.2
    assert reward.mean() > 0.85


@pytest.mark.parametrize("target", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(
    ("form", "baseline"), [("resample", False), ("one_pass", False), ("one_pass", True)]
)
def test_8_the_entropy_is_held_within_five_percent(
    form: Literal["resample", "one_pass"], baseline: bool, target: float
) -> None:
    cfg = AepoConfig(
        form=form,
        baseline=baseline,
        entropy_target=target,
        alpha=1.0,
        gain=2.0,
        integral_gain=0.1,
        temperature_min=0.5,
        temperature_max=3.0,
    )
    entropy, reward = closed_loop(cfg)
    assert entropy.mean().item() == pytest.approx(target, rel=0.05)
    # Held, not swinging about the target; what is left is the noise of 384 samples.
    assert (entropy - target).abs().mean() < 0.15 * target
    assert reward.mean() > 0.85
