"""Rows left out at random: the mean over draws is the exact gradient, the variance is as said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aepo_kernels import RowSampling
from tests.kernels.head.test_token_loss import grpo_like, make_columns, policy_gradient, run
from tests.kernels.oracle import Case, make_case


def copied(case: Case, copies: int) -> Case:
    """The same tokens many times over: a call draws each of them for itself."""
    options = {
        name: value.repeat(copies) if isinstance(value, torch.Tensor) else value
        for name, value in case.options.items()
    }
    hidden, targets = case.hidden.repeat(copies, 1), case.targets.repeat(copies)
    return replace(case, hidden=hidden, targets=targets, options=options)


def mean_gradients(case: Case, copies: int, *columns: torch.Tensor, **more: object) -> torch.Tensor:
    """The gradients of a call over `copied` tokens, each the mean over the copies."""
    leaves = copied(case, copies).fresh()
    columns = tuple(column.repeat(copies) for column in columns)
    run(leaves, grpo_like, *columns, **more).loss.backward()
    hidden, *weights = [x.grad for x in leaves.tensors() if x.grad is not None]
    hidden = hidden.double().view(copies, *case.hidden.shape).mean(0)
    return torch.cat([hidden.flatten(), *(x.double().flatten() / copies for x in weights)])


@pytest.mark.parametrize("option", ["plain", "all"])
def test_the_mean_over_draws_is_the_exact_gradient(option: str) -> None:
    case = make_case(30, 8, 40, option=option)
    columns = make_columns(case)
    exact = mean_gradients(case, 1, *columns)
    rng = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [mean_gradients(case, 40, *columns, row_sampling=RowSampling(0.02, rng)) for _ in range(50)]
    )
    spread = draws.std(0) / len(draws) ** 0.5
    assert (spread > 0).any()
    distance = (draws.mean(0) - exact).abs()
    # Of some 600 numbers, none should be 6 standard errors away.
    assert (distance <= 6 * spread + 1e-6).all()


def test_the_reported_variance_is_that_of_the_logits_gradient() -> None:
    # With the identity as weight, hidden states are logits and their gradient is that of logits.
    # A call has the same tokens many times over, and each of them is drawn for itself.
    num_tokens, vocab, copies, calls = 24, 16, 100, 30
    hidden = 2 * torch.randn(num_tokens, vocab, generator=torch.Generator().manual_seed(3))
    targets = torch.arange(num_tokens) % vocab
    columns = [column.repeat(copies) for column in make_columns(Case(hidden, hidden, targets))]
    case = copied(Case(hidden, torch.eye(vocab), targets), copies)

    rng = torch.Generator().manual_seed(1)
    reported, draws, rows = [], [], []
    for _ in range(calls):
        leaves = case.fresh()
        output = run(leaves, grpo_like, *columns, row_sampling=RowSampling(0.03, rng))
        output.loss.backward()
        assert leaves.hidden.grad is not None
        draws += leaves.hidden.grad.double().view(copies, num_tokens, vocab)
        reported.append(output.metrics["row_sampling/variance"].item() / copies)
        rows.append(output.active_rows / copies)
        assert output.metrics["row_sampling/rows"] == output.active_rows
    measured = torch.stack(draws).var(0).sum().item()
    assert 0 < sum(rows) / calls < num_tokens
    assert sum(reported) / calls == pytest.approx(measured, rel=0.1)


def test_a_small_threshold_keeps_every_row_that_matters() -> None:
    case = make_case(30, 8, 40)
    columns = make_columns(case)
    exact = mean_gradients(case, 1, *columns)
    sampled = mean_gradients(case, 1, *columns, row_sampling=RowSampling(1e-12))
    torch.testing.assert_close(sampled, exact)


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_thresholds_raise(threshold: float) -> None:
    leaves = make_case(5, 8, 30).fresh()
    with pytest.raises(ValueError, match=r"row_sampling.threshold = .*must be positive"):
        run(leaves, policy_gradient, torch.randn(5), row_sampling=RowSampling(threshold))
