"""What shows that the method is right: its expected effect on entropy, and what would undo it.

All on exact expectations over a tabular softmax in float64, with the token losses of the trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from aepo_fast.config.method import CONTROLLER_DEFAULTS, AepoConfig, Controller
from aepo_fast.config.sections import TrainerConfig
from aepo_fast.method.aepo_terms import one_pass_token_loss, resample_token_loss, temperature_ratio
from aepo_fast.method.controllers import make_controller
from aepo_fast.method.credit import plan_minibatches
from aepo_fast.method.entropy_control import Measurement
from aepo_fast.training.run import train
from aepo_kernels import linear_token_loss
from tests.tiny_run import tiny_config

V = 2000


def entropy_of(logits: torch.Tensor) -> float:
    logprob = torch.log_softmax(logits, -1)
    return -(logprob.exp() * logprob).sum().item()


def expected_gradient(
    logits: torch.Tensor,
    law: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Gradient by the logits of sum_a law(a) loss(log pi)(a), with `law` held fixed."""
    leaf = logits.clone().requires_grad_()
    total = (law * loss(torch.log_softmax(leaf, -1))).sum()
    return torch.autograd.grad(total, leaf)[0]


@pytest.fixture
def logits() -> torch.Tensor:
    return 2 * torch.randn(V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 0.8, 0.99, 1.01, 1.2, 2.0])
def test_1_entropy_moves_with_the_sign_of_t_minus_1(
    logits: torch.Tensor, temperature: float
) -> None:
    tempered = torch.softmax(logits / temperature, -1)
    step = 1e-4
    gradient = expected_gradient(
        logits, tempered, lambda lp: resample_token_loss(lp, lp.detach(), 0.2, 0.2).loss
    )
    change = entropy_of(logits - step * gradient) - entropy_of(logits)
    assert change * (temperature - 1) > 0
    if temperature == 1.01:
        logprob = torch.log_softmax(logits, -1)
        spread = (logprob.exp() * (logprob + entropy_of(logits))).square().sum().item()
        assert change == pytest.approx(step * (temperature - 1) * spread, rel=0.05)


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_2_the_one_pass_gradient_is_that_of_sampling_at_t(
    logits: torch.Tensor, temperature: float, baseline: bool
) -> None:
    logprob = torch.log_softmax(logits, -1)
    at_t = torch.log_softmax(logits / temperature, -1)
    rho = temperature_ratio(at_t, logprob, rho_clip=1e6)
    one_pass = expected_gradient(
        logits,
        logprob.exp(),
        lambda lp: one_pass_token_loss(lp, lp.detach(), rho, 0.2, 0.2, baseline=baseline).loss,
    )
    exact = expected_gradient(logits, at_t.exp(), lambda lp: -lp)
    torch.testing.assert_close(one_pass, exact, atol=1e-12, rtol=1e-9)


def test_2_with_wrong_actions_only_the_form_without_baseline_is_that_of_sampling_at_t() -> None:
    # Three actions, one right and likely. At T = 1.5 its rho is below 1.
    logits = torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64)
    reward = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    logprob = torch.log_softmax(logits, -1)
    at_t = torch.log_softmax(logits / 1.5, -1)
    rho = temperature_ratio(at_t, logprob, rho_clip=1e6)
    gradients = {
        baseline: expected_gradient(
            logits,
            logprob.exp() * reward,
            lambda lp, baseline=baseline: (
                one_pass_token_loss(lp, lp.detach(), rho, 0.2, 0.2, baseline=baseline).loss
            ),
        )
        for baseline in (False, True)
    }
    exact = expected_gradient(logits, at_t.exp() * reward, lambda lp: -lp)
    torch.testing.assert_close(gradients[False], exact, atol=1e-12, rtol=1e-9)
    assert gradients[False][0] < 0  # descent raises the right action
    assert gradients[True][0] > 0  # the baseline lowers it: entropy at the cost of accuracy


@pytest.mark.parametrize("temperature", [0.8, 1.2])
def test_3_the_tempered_old_policy_in_the_ratio_cancels_the_effect(
    logits: torch.Tensor, temperature: float
) -> None:
    at_t = torch.log_softmax(logits / temperature, -1)
    right = expected_gradient(
        logits, at_t.exp(), lambda lp: resample_token_loss(lp, lp.detach(), 9.0, 1e9).loss
    )
    # The ratio to the law that sampled, without a clip in the way: importance sampling.
    trap = expected_gradient(logits, at_t.exp(), lambda lp: -(lp - at_t).exp())
    assert trap.abs().max() < 1e-12
    assert right.abs().max() > 1e-3


@pytest.mark.parametrize("num_minibatches", [1, 3, 4, 16])
@pytest.mark.parametrize("num_positives", [0, 1, 7, 16])
def test_4_positives_are_spread_evenly_over_minibatches(
    num_minibatches: int, num_positives: int
) -> None:
    groups = [[4 * group + sample for sample in range(4)] for group in range(16)]
    positives = list(range(100, 100 + num_positives))
    plan = plan_minibatches(
        groups,
        positives,
        num_minibatches=num_minibatches,
        rng=np.random.default_rng(0),
    )
    assert len(plan) == num_minibatches
    shares = [sum(row >= 100 for row in minibatch) for minibatch in plan]
    assert max(shares) - min(shares) <= 1 and sum(shares) == num_positives
    assert sorted(row for minibatch in plan for row in minibatch) == [*range(64), *positives]
    counts = []
    for minibatch in plan:
        main = {row // 4 for row in minibatch if row < 100}
        assert all(set(groups[group]) <= set(minibatch) for group in main)
        counts.append(len(main))
    assert max(counts) - min(counts) <= 1


def test_5_without_positives_aepo_is_exactly_grpo(tiny_model_dir: Path, tmp_path: Path) -> None:
    weights = []
    for name, aepo in {
        "grpo": AepoConfig(enabled=False),
        "observer": AepoConfig(reward_threshold=2.0, entropy_target=9.0),
        "published": AepoConfig(
            controller="published", alpha=0.5, reward_threshold=2.0, entropy_target=9.0
        ),
    }.items():
        cfg = tiny_config(tiny_model_dir, tmp_path / name, aepo=aepo)
        cfg = replace(cfg, trainer=replace(cfg.trainer, steps=2))
        assert train(cfg) == 0
        weights.append(load_file(tmp_path / name / "checkpoints" / "step_2" / "model.safetensors"))
    for name, tensor in weights[0].items():
        assert all(torch.equal(tensor, other[name]) for other in weights[1:]), name


@pytest.mark.parametrize("name", list(CONTROLLER_DEFAULTS))
def test_6_a_resumed_controller_gives_the_same_temperatures(name: Controller) -> None:
    cfg, trainer = AepoConfig(controller=name), TrainerConfig()
    entropies = [1.9, 1.2, 0.7, 0.45, 0.4, 0.55, 0.3, 0.5]
    straight, resumed = make_controller(cfg, trainer), make_controller(cfg, trainer)
    assert straight.temperature() == 1.0
    expected, actual = [], []
    for entropy in entropies:
        straight.update(Measurement(entropy, 0.05, straight.temperature(), 1))
        expected.append(straight.temperature())
        again = make_controller(cfg, trainer)
        again.load_state_dict(resumed.state_dict())
        resumed = again
        resumed.update(Measurement(entropy, 0.05, resumed.temperature(), 1))
        actual.append(resumed.temperature())
    assert actual == expected
    assert len(set(expected)) > 1


def test_7_minus_logprob_has_no_gradient_on_policy_but_entropy_has() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    probabilities = torch.softmax(hidden @ weight.T, -1)[0]
    gradients = []
    for name in ("logprob", "entropy"):
        h, w = hidden.expand(50, -1).clone().requires_grad_(), weight.clone().requires_grad_()

        def expectation(logprob, entropy, second, law, which=name):  # type: ignore[no-untyped-def]
            return (law * (-logprob if which == "logprob" else entropy)).sum()

        # Every action once, weighted by its probability: the exact on-policy expectation.
        out = linear_token_loss(
            h, w, torch.arange(50), expectation, probabilities, backend="reference"
        )
        out.loss.backward()
        assert w.grad is not None
        gradients.append(w.grad.abs().max().item())
    assert gradients[0] < 1e-12
    assert gradients[1] > 1e-2
