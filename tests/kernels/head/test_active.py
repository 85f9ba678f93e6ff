"""linear_token_loss told which tokens have a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.head.test_token_loss import (
    BACKENDS,
    by_autograd,
    grpo_like,
    make_columns,
    policy_gradient,
    run,
)
from tests.kernels.oracle import IGNORED, assert_as_accurate, make_case, materialised


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", ["plain", "ignored", "all"])
def test_the_gradient_is_taken_at_active_tokens_alone(option: str, backend: str) -> None:
    case = make_case(120, 32, 200, option=option)
    columns = make_columns(case)
    active = torch.randperm(120, generator=torch.Generator().manual_seed(5))[:70]
    inside = torch.zeros(120, dtype=torch.bool)
    inside[active] = True
    keep = case.targets != IGNORED

    def within(logprob: Tensor, entropy: Tensor, second: Tensor | None, *rest: Tensor) -> Any:
        mask = inside[keep]
        frozen = [x if x is None else x.where(mask, x.detach()) for x in (logprob, entropy, second)]
        return grpo_like(*frozen, *rest)  # type: ignore[arg-type]

    leaves = case.fresh()
    output = run(leaves, grpo_like, *columns, backend=backend, chunk_tokens=30, active=active)
    output.loss.backward()
    value, metrics, expected = by_autograd(case.fresh(torch.float64), within, *columns)
    _, _, base = by_autograd(case.fresh(), within, *columns)
    torch.testing.assert_close(output.loss.double(), value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        output.metrics["entropy"].double(), metrics["entropy"], rtol=1e-5, atol=0
    )
    for tensor, theirs, truth in zip(leaves.tensors(), base, expected, strict=True):
        assert tensor.grad is not None
        assert_as_accurate(tensor.grad, theirs, truth, "gradient")
    truth = materialised(case.fresh(torch.float64))[0]
    assert truth is not None
    torch.testing.assert_close(output.logprob.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("active", "reason"),
    [
        ([3, 40], r"outside \[0, 40\)"),
        ([-1], r"outside \[0, 40\)"),
        ([2, 2], "stands there twice"),
        ([[1]], "no list of positions"),
    ],
)
def test_bad_active_positions_raise(active: list, reason: str) -> None:
    leaves = make_case(40, 8, 30).fresh()
    with pytest.raises(ValueError, match=f"active = .*{reason}"):
        run(leaves, policy_gradient, torch.ones(40), active=torch.tensor(active))
