"""Advantages, aggregation and the whole objective: parts of a batch add up to the batch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.method.credit import group_advantages, plan_minibatches, token_weights
from aepo_fast.method.metric_sums import MetricSum
from aepo_fast.method.objective import Objective, build_objective
from aepo_fast.method.policy_losses import clipped_surrogate, kl_to_reference
from aepo_fast.method.token_objective import Metrics
from aepo_fast.method.tokens import StepContext
from aepo_fast.samples import Completion, Sample, TokenValues
from tests.tiny_run import tiny_config

NAN = float("nan")
RESAMPLE = AepoConfig(controller="published", alpha=0.5)
NO_TOTALS = {"max_length": 1, "num_samples_total": 0, "num_tokens_total": 0}


def test_group_advantages_against_statistics_of_each_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.2, NAN, 0.4, 3.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
    normed = group_advantages(rewards, groups, "group_norm")
    centred = group_advantages(rewards, groups, "group_mean")
    first = rewards[:4].double()
    torch.testing.assert_close(normed[:4].double(), (first - first.mean()) / (first.std() + 1e-6))
    torch.testing.assert_close(centred[:4].double(), first - first.mean())
    assert normed[4:7].tolist() == [0, 0, 0]  # no spread
    assert normed[8] == 0 and normed[7] == -normed[9] != 0  # the unscored row takes no part
    assert normed[10] == 0  # alone
    thirds = group_advantages(torch.full((3,), 0.1) * 3, torch.zeros(3), "group_norm")
    assert thirds.tolist() == [0, 0, 0]


def test_no_rows() -> None:
    none = torch.zeros(0)
    assert len(group_advantages(none, none, "group_norm")) == 0
    assert len(token_weights(none.long(), "token_mean", **NO_TOTALS)) == 0
    plan = plan_minibatches([], [], num_minibatches=2, rng=np.random.default_rng(0))
    assert plan == [[], []]


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean", "constant_length"])
def test_aggregation_equals_its_definition_however_it_is_split(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 7, 1, 4])
    losses = [torch.randn(int(n), generator=generator) for n in lengths]
    expected = {
        "token_mean": torch.cat(losses).mean(),
        "sequence_mean": torch.stack([part.mean() for part in losses]).mean(),
        "constant_length": torch.cat(losses).sum() / (4 * 10),
    }[mode]
    for ranks in ([[0, 1, 2, 3]], [[0, 3], [1, 2]], [[2], [], [0, 1, 3]]):
        total = torch.zeros(())
        for rank in ranks:
            weights = token_weights(
                lengths[rank], mode, max_length=10, num_samples_total=4, num_tokens_total=15
            )
            for row, weight in zip(rank, weights, strict=True):
                total += weight * losses[row].sum()
        torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean", "constant_length"])
@pytest.mark.parametrize(("num_parts", "micro"), [(1, 6), (2, 1), (4, 2)])
def test_gradients_are_equal_however_rows_are_split(mode: str, num_parts: int, micro: int) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 9, (6,), generator=generator)
    lengths[4] = 0  # a row without tokens still counts as a row
    rows = torch.arange(6).repeat_interleave(lengths)
    inputs = torch.randn(int(lengths.sum()), 5, generator=generator, dtype=torch.float64)
    advantage = torch.randn(6, generator=generator, dtype=torch.float64)
    old = torch.full((len(rows),), -2.0, dtype=torch.float64)

    def gradient(parts: list[list[int]]) -> torch.Tensor:
        weight = torch.full((5,), 0.1, dtype=torch.float64, requires_grad=True)
        for part in parts:  # backward once a part, as micro-batches do; grads add up
            mine = torch.isin(rows, torch.tensor(part, dtype=torch.long))
            logprob = old[mine] + 0.3 * (inputs[mine] @ weight).tanh()
            terms = clipped_surrogate(logprob, old[mine], advantage[rows[mine]], 0.2, 0.28)
            per_row = token_weights(
                lengths[part], mode, max_length=9, num_samples_total=6, num_tokens_total=len(rows)
            )
            per_token = per_row.double().repeat_interleave(lengths[part])
            (per_token * terms.loss).sum().backward()
        assert weight.grad is not None
        return weight.grad

    # Rows in ascending order within a part, so that weights and tokens line up.
    cells = plan_minibatches(
        [[row] for row in range(6)], [], num_minibatches=num_parts, rng=np.random.default_rng(0)
    )
    parts = [sorted(cell[at : at + micro]) for cell in cells for at in range(0, len(cell), micro)]
    assert len(parts) > 1 or num_parts == 1
    whole = gradient([list(range(6))])
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(gradient(parts), whole, atol=1e-14, rtol=1e-12)


def rows_of(groups: int, size: int, aux: int, generator: torch.Generator) -> list[Sample]:
    rows = []
    for index in range(groups * size + aux):
        length = int(torch.randint(1, 6, (1,), generator=generator))
        reward = float(torch.randint(0, 2, (1,), generator=generator))
        is_aux = index >= groups * size
        completion = Completion((1, 2), (3,) * length, (0.0,) * length, "stop", 1.0, 0)
        rows.append(Sample(completion, groups if is_aux else index // size, is_aux, reward))
    return rows


def evaluate(objective: Objective, logprob: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    entropy, second = -logprob.detach(), 0.7 * logprob.detach()
    columns = {name: values[keep] for name, values in objective.columns.items()}
    use_second = second[keep] if objective.second_temperature else None
    return objective.token_loss(logprob[keep], entropy[keep], use_second, columns)[0]


@pytest.mark.parametrize(
    ("loss", "aepo"),
    [
        (LossConfig(), RESAMPLE),
        (LossConfig(policy="dapo"), replace(RESAMPLE, normalizer="positives")),
        (LossConfig(policy="dr_grpo", entropy_method="bonus"), AepoConfig(enabled=False)),
        (LossConfig(policy="cispo"), AepoConfig(form="one_pass", alpha=0.3)),
        (LossConfig(policy="sapo"), AepoConfig(form="lift", alpha=0.3)),
        (LossConfig(), AepoConfig(form="dcpo")),
    ],
)
def test_the_objective_is_its_formula_and_adds_up_over_chunks(
    tmp_path: Path, loss: LossConfig, aepo: AepoConfig
) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = rows_of(4, 4, 6 if aepo.form == "resample" and aepo.enabled else 0, generator)
    cfg = replace(tiny_config(tmp_path, tmp_path), loss=loss, aepo=aepo)
    rewards = torch.tensor([NAN if row.is_aux else row.reward for row in rows])
    groups = torch.tensor([row.group for row in rows])
    advantages = group_advantages(rewards, groups, loss.advantage)
    aux = [row for row in rows if row.is_aux]
    positives = sum(row.reward == 1 for row in aux)
    bonus = 1e-3 if loss.entropy_method == "bonus" else 0.0
    context = StepContext(1.1, bonus, 0.2, len(aux), positives, 1)
    objective = build_objective(
        cfg,
        rows,
        advantages,
        range(len(rows)),
        context,
        old=None,
        reference=None,
        generator=generator,
    )
    total = sum(row.length for row in rows)
    logprob = (-3 * torch.rand(total, generator=generator)).requires_grad_()
    whole = evaluate(objective, logprob, torch.arange(total))
    (gradient,) = torch.autograd.grad(whole, logprob)
    parts = sum(evaluate(objective, logprob, chunk) for chunk in torch.arange(total).split(7))
    torch.testing.assert_close(parts, whole)

    # Its gradient, written out row by row: at ratio 1, d(-r A) / d(log pi) = -A.
    expected = []
    main_rows = [row for row in rows if not row.is_aux]
    main_tokens = sum(row.length for row in main_rows)
    position = 0
    for row, advantage in zip(rows, advantages.tolist(), strict=True):
        for token in range(position, position + row.length):
            if row.is_aux:
                count = len(aux) if aepo.normalizer == "draws" else positives
                value = -aepo.alpha * (row.reward == 1) / (count * row.length)
            else:
                weight = {
                    "token_mean": 1 / main_tokens,
                    "sequence_mean": 1 / (len(main_rows) * row.length),
                    "constant_length": 1 / (len(main_rows) * cfg.rollout.max_new_tokens),
                }[loss.aggregation]
                lp = logprob[token].item()
                rho = min(max(torch.tensor(0.7 * lp - lp).exp().item(), 1 / 3), 3.0)
                signal = advantage
                if aepo.enabled and aepo.form == "one_pass":
                    signal += aepo.alpha * rho * (row.reward == 1)
                if aepo.enabled and aepo.form == "lift":
                    signal += aepo.alpha * (rho - 1) * (row.reward == 1)  # rho > 1 everywhere
                if aepo.enabled and aepo.form == "dcpo":
                    signal = 0.8 * advantage + 0.2 * rho * (row.reward == 1)
                value = -weight * signal
            expected.append(value)
        position += row.length
    torch.testing.assert_close(gradient, torch.tensor(expected), atol=1e-6, rtol=1e-5)

    # Rows called passive have no gradient, the others do.
    lengths = torch.tensor([row.length for row in rows])
    by_row = gradient.abs().split(lengths.tolist())
    silent = {index for index, part in enumerate(by_row) if part.sum() == 0}
    if not bonus:
        assert silent == objective.passive_samples


def test_the_auxiliary_share_is_the_same_in_every_minibatch(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = [replace(row, task_reward=1.0) for row in rows_of(4, 4, 8, generator)]
    cfg = replace(tiny_config(tmp_path, tmp_path), aepo=replace(RESAMPLE, alpha=0.25))
    context = StepContext(1.2, 0.0, 0.0, 8, 8, 2)
    for minibatch in ([*range(8), *range(16, 20)], [*range(8, 16), *range(20, 24)]):
        objective = build_objective(
            cfg,
            rows,
            torch.zeros(len(rows)),
            minibatch,
            context,
            old=None,
            reference=None,
            generator=generator,
        )
        assert objective.columns["aux_weight"].sum().item() == pytest.approx(0.25)
        assert objective.columns["weight"].sum().item() == pytest.approx(1.0)


def gradient_of(
    output: Path, loss: LossConfig, rows: list[Sample], logprob: torch.Tensor, **scores: Any
) -> tuple[torch.Tensor, Metrics, dict[str, torch.Tensor]]:
    """Gradient by the log-probs, metrics and columns of all rows' objective; no main advantage."""
    cfg = replace(tiny_config(output, output), loss=loss, aepo=RESAMPLE)
    num_aux = sum(row.is_aux for row in rows)
    objective = build_objective(
        cfg,
        rows,
        torch.zeros(len(rows)),
        range(len(rows)),
        StepContext(1.2, 0.0, 0.0, num_aux, num_aux, 1),
        generator=torch.Generator(),
        **{"old": None, "reference": None, **scores},
    )
    entropy, columns = torch.zeros(len(logprob)), objective.columns
    if objective.sequence_loss is not None:
        lengths = torch.tensor([row.length for row in rows])
        sample_of_token = torch.arange(len(rows)).repeat_interleave(lengths)
        total, metrics = objective.sequence_loss(logprob, entropy, None, sample_of_token, columns)
    else:
        total, metrics = objective.token_loss(logprob, entropy, None, columns)
    return torch.autograd.grad(total, logprob)[0], metrics, columns


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("policy", ["grpo", "gspo"])
def test_the_kl_to_the_reference_is_that_of_main_tokens(
    tmp_path: Path, policy: Any, estimator: Any
) -> None:
    generator = torch.Generator().manual_seed(4)
    rows = rows_of(2, 3, 2, generator)
    total = sum(row.length for row in rows)
    logprob = (-3 * torch.rand(total, generator=generator)).requires_grad_()
    reference = TokenValues(-3 * torch.rand(total, generator=generator), torch.zeros(total), None)
    loss = LossConfig(policy=policy)
    without, _, _ = gradient_of(tmp_path, loss, rows, logprob)
    loss = replace(loss, kl_coef=0.05, kl_estimator=estimator)
    found, metrics, columns = gradient_of(tmp_path, loss, rows, logprob, reference=reference)
    kl = kl_to_reference(logprob, reference.logprob, estimator)
    (slope,) = torch.autograd.grad((columns["weight"] * kl).sum(), logprob)
    assert slope.abs().sum() > 0
    torch.testing.assert_close(found - without, 0.05 * slope, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(metrics[MetricSum.KL], (columns["main"] * kl).sum().detach())


@pytest.mark.parametrize("policy", ["grpo", "gspo"])
@pytest.mark.parametrize(("shift", "clipped"), [(0.1, False), (0.3, True)])
def test_auxiliary_tokens_are_clipped_as_tokens(
    tmp_path: Path, policy: Any, shift: float, clipped: bool
) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = [replace(row, task_reward=1.0) for row in rows_of(2, 2, 3, generator)]
    old = torch.full((sum(row.length for row in rows),), -2.0)
    logprob = (old + shift).requires_grad_()
    scores = TokenValues(old, torch.zeros(len(old)), None)
    loss = LossConfig(policy=policy)
    found, metrics, columns = gradient_of(tmp_path, loss, rows, logprob, old=scores)
    expected = torch.zeros(len(old)) if clipped else -columns["aux_weight"] * math.exp(shift)
    torch.testing.assert_close(found, expected)
    assert metrics[MetricSum.AUX_CLIP] == (metrics[MetricSum.AUX_TOKENS] if clipped else 0)
