"""Method test 8: the controller holds the entropy of a toy policy where GRPO lets it collapse.

The toy is a softmax table. All else is the trainer's own: rows, advantages, objective, head,
optimizer, the measured entropy with its sampling error, and the controller.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from aepo_fast.config.method import AepoConfig, Controller, LossConfig
from aepo_fast.config.sections import Config, TrainerConfig
from aepo_fast.method.controllers import make_controller
from aepo_fast.method.credit import group_advantages
from aepo_fast.method.entropy_control import Measurement, aepo_draws
from aepo_fast.method.objective import build_objective
from aepo_fast.method.token_objective import taking_slices
from aepo_fast.method.tokens import StepContext
from aepo_fast.samples import Completion, Sample, token_mean
from aepo_fast.training.optim import build_optimizer, guarded_step
from aepo_kernels import linear_token_loss
from tests.tiny_run import tiny_config

STATES, ACTIONS, CORRECT = 24, 32, 8
PROMPTS, GROUP = 24, 16  # of a step
# Steps of a run and those of its end that are judged, by beta1. Until then GRPO's pull still grows,
# and what acts on the error alone stays behind it.
STEPS = {0.9: (900, 500), 0.5: (600, 300)}


@cache
def row(state: int, action: int, reward: float, group: int, is_aux: bool) -> Sample:
    return Sample(Completion((state,), (action,), (0.0,), "stop", 1.0, 0), group, is_aux, reward)


class Toy:
    """One softmax over ACTIONS per state: one-hot states as hidden states, the table as the head.

    The first CORRECT actions earn 1 in nine cases of ten, so that groups keep their spread and
    GRPO keeps moving, as it does with a noisy verifier.
    """

    def __init__(self, cfg: Config, seed: int) -> None:
        self.cfg, self.generator = cfg, torch.Generator().manual_seed(seed)
        self.head = torch.nn.Linear(STATES, ACTIONS, bias=False)
        torch.nn.init.zeros_(self.head.weight)
        self.optimizer = build_optimizer(self.head, cfg.trainer)

    def sample(self, states: torch.Tensor, temperature: float, *, first: int = 0) -> list[Sample]:
        """GROUP rows per state; those of auxiliary prompts have groups from `first` on."""
        law = torch.softmax(self.head.weight.detach().T[states] / temperature, -1)
        drawn = torch.multinomial(law, GROUP, replacement=True, generator=self.generator)
        luck = torch.rand(drawn.shape, generator=self.generator) < 0.9
        right = ((drawn < CORRECT) & luck).float()
        return [
            row(state, action, reward, first + group, first > 0)
            for group, state in enumerate(states.tolist())
            for action, reward in zip(drawn[group].tolist(), right[group].tolist(), strict=True)
        ]

    def step(self, temperature: float) -> tuple[Measurement, float]:
        """One update at a T; what the controller is told of it, and the mean reward."""
        aepo = self.cfg.aepo
        states = torch.randperm(STATES, generator=self.generator)[:PROMPTS]
        rows = self.sample(states, 1.0)
        num_main = len(rows)
        if aepo.enabled and aepo.form == "resample":
            again = states[: aepo_draws(PROMPTS, aepo.alpha)]
            rows += self.sample(again, temperature, first=PROMPTS)
        rewards = torch.tensor([float(row.reward or 0) for row in rows])
        rewards[num_main:] = float("nan")
        groups = torch.tensor([row.group for row in rows])
        objective = build_objective(
            self.cfg,
            rows,
            group_advantages(rewards, groups, self.cfg.loss.advantage),
            range(len(rows)),
            StepContext(
                temperature=temperature,
                bonus_coef=0.0,
                dcpo_mix=0.0,
                aux_draws=len(rows) - num_main,
                aux_positives=sum(row.reward == 1 for row in rows[num_main:]),
                num_minibatches=1,
            ),
            old=None,
            reference=None,
            generator=self.generator,
        )
        at = torch.tensor([row.completion.prompt_ids[0] for row in rows])
        result = linear_token_loss(
            torch.nn.functional.one_hot(at, STATES).float(),
            self.head.weight,
            torch.tensor([row.completion.completion_ids[0] for row in rows]),
            taking_slices(objective.token_loss, list(objective.columns)),
            *objective.columns.values(),
            second_temperature=objective.second_temperature,
            ignore_index=None,
        )
        result.loss.backward()
        limit = self.cfg.trainer.max_grad_norm
        _, taken = guarded_step(self.optimizer, result.loss.item(), max_grad_norm=limit)
        measured = token_mean(result.entropy, rows, range(num_main))
        return Measurement(*measured, temperature, taken), rewards[:num_main].mean().item()

    def entropy(self) -> float:
        """The mean over all states, nats: what the controller sees a sample of."""
        logprob = torch.log_softmax(self.head.weight.detach().double(), 0)
        return -(logprob.exp() * logprob).sum(0).mean().item()


def closed_loop(
    aepo: AepoConfig, *, beta1: float, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The policy's entropy, T and mean reward of a run's last steps."""
    # Steps of this lr collapse the policy within the run. With beta2 = 0.999 AdamW would remember
    # the large gradients of the start all along, and GRPO's pull would grow from step to step.
    trainer = TrainerConfig(
        lr=0.3, beta1=beta1, beta2=0.99, prompts_per_step=PROMPTS, group_size=GROUP
    )
    nowhere = Path("toy")
    cfg = tiny_config(nowhere, nowhere, loss=LossConfig(), aepo=aepo, trainer=trainer)
    toy, controller = Toy(cfg, seed), make_controller(aepo, trainer)
    entropies, temperatures, rewards = [], [], []
    steps, late = STEPS[beta1]
    for _ in range(steps):
        entropies.append(toy.entropy())
        temperatures.append(controller.temperature())
        measured, reward = toy.step(temperatures[-1])
        controller.update(measured)
        rewards.append(reward)
    found = (torch.tensor(values[-late:]) for values in (entropies, temperatures, rewards))
    entropy, temperature, reward = found
    return entropy, temperature, reward


@pytest.mark.slow
def test_8_plain_grpo_collapses() -> None:
    entropy, temperature, reward = closed_loop(AepoConfig(enabled=False), beta1=0.9)
    assert entropy.mean() < 0.2
    assert (temperature == 1).all()
    assert reward.mean() > 0.85


@pytest.mark.soak
def test_8_the_published_settings_do_not_hold_the_entropy() -> None:
    cfg = AepoConfig(controller="published", entropy_target=0.5)
    entropy, temperature, _ = closed_loop(cfg, beta1=0.5)
    assert entropy.mean() < 0.6 * cfg.entropy_target
    assert temperature.mean() > 1.15  # though T is at its maximum


@pytest.mark.slow
@pytest.mark.parametrize(
    ("controller", "target", "beta1"),
    [
        *(("observer", target, 0.9) for target in (0.25, 0.5, 0.75, 1.0)),
        pytest.param("observer", 0.25, 0.5, marks=pytest.mark.soak),
        pytest.param("pi", 0.5, 0.9, marks=pytest.mark.soak),
    ],
)
def test_8_the_entropy_is_held_within_five_percent(
    controller: Controller, target: float, beta1: float
) -> None:
    cfg = AepoConfig(controller=controller, entropy_target=target)
    assert cfg.form == "lift"
    entropy, _, reward = closed_loop(cfg, beta1=beta1)
    assert entropy.mean().item() == pytest.approx(target, rel=0.05)
    # Held, not swinging about the target: a step's measurement is off by about 10% itself.
    assert (entropy - target).abs().mean() < 0.2 * target
    assert reward.mean() > 0.85
