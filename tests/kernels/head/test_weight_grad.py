"""The weight's gradient added to the caller's buffer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from aepo_kernels import linear_logprob
from tests.kernels.head.test_token_loss import grpo_like, make_columns, policy_gradient, run
from tests.kernels.oracle import make_case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_tokens", [25, None])
def test_token_loss_adds_to_the_buffer(dtype: torch.dtype, chunk_tokens: int | None) -> None:
    case = make_case(60, 32, 200, option="all", dtype=dtype)
    columns = make_columns(case)
    plain, added = case.fresh(), case.fresh()
    run(plain, grpo_like, *columns, chunk_tokens=chunk_tokens).loss.backward()
    buffer = torch.full((200, 32), 2.0)
    output = run(added, grpo_like, *columns, chunk_tokens=chunk_tokens, weight_grad=buffer)
    output.loss.backward()
    assert added.weight.grad is None
    assert plain.weight.grad is not None and plain.hidden.grad is not None
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        buffer - 2.0, plain.weight.grad.float(), rtol=tolerance, atol=tolerance * 1e-1
    )
    assert added.hidden.grad is not None and torch.equal(added.hidden.grad, plain.hidden.grad)


def test_logprob_adds_to_the_buffer_in_backward() -> None:
    case = make_case(40, 16, 100)
    plain, added = case.fresh(), case.fresh()
    linear_logprob(plain.hidden, plain.weight, plain.targets).logprob.sum().backward()
    buffer = torch.zeros(100, 16)
    output = linear_logprob(added.hidden, added.weight, added.targets, weight_grad=buffer)
    assert (buffer == 0).all()
    output.logprob.sum().backward()
    assert added.weight.grad is None and plain.weight.grad is not None
    torch.testing.assert_close(buffer, plain.weight.grad)


def test_a_factor_that_comes_too_late_raises() -> None:
    leaves = make_case(20, 8, 30).fresh()
    output = run(leaves, policy_gradient, torch.randn(20), weight_grad=torch.zeros(30, 8))
    with pytest.raises(RuntimeError, match="put the factor inside token_loss"):
        (output.loss * 0.5).backward()


@pytest.mark.parametrize(
    ("buffer", "frozen", "backend", "reason"),
    [
        (torch.zeros(30, 9), False, "chunked", r"weight_grad = .*must be \[30, 8\]"),
        (torch.zeros(30, 8).bfloat16(), False, "chunked", "must be .* torch.float32"),
        (torch.zeros(30, 8), True, "chunked", "weight = frozen"),
        (torch.zeros(30, 8), False, "reference", "reference returns its gradients"),
    ],
)
def test_bad_buffers_raise(buffer: torch.Tensor, frozen: bool, backend: str, reason: str) -> None:
    leaves = make_case(20, 8, 30).fresh()
    leaves.weight.requires_grad_(not frozen)
    with pytest.raises(ValueError, match=reason):
        run(leaves, policy_gradient, torch.randn(20), weight_grad=buffer, backend=backend)


def test_a_buffer_that_cannot_hold_a_sum_raises() -> None:
    leaves = make_case(20, 8, 30).fresh()
    for buffer, reason in (
        (torch.zeros(1, 8).expand(30, 8), "its rows share memory"),
        (torch.zeros(30, 1).expand(30, 8), "its rows share memory"),
        (torch.zeros(100).as_strided((30, 8), (2, 1)), "its rows share memory"),
        (leaves.weight.detach(), "is the weight itself"),
    ):
        with pytest.raises(ValueError, match=f"weight_grad = .*{reason}"):
            run(leaves, policy_gradient, torch.randn(20), weight_grad=buffer)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("after", [False, True])
def test_a_checkpoint_adds_to_the_buffer_once_or_says_so(reentrant: bool, after: bool) -> None:
    case, advantage = make_case(60, 8, 30), torch.linspace(-1, 2, 60)
    plain, leaves, factor = case.fresh(), case.fresh(), torch.ones((), requires_grad=True)
    part = replace(plain, hidden=plain.hidden.tanh())
    run(part, policy_gradient, advantage, chunk_tokens=16).loss.backward()
    buffer, calls = torch.zeros(30, 8), []

    def region(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        part = replace(leaves, hidden=hidden.tanh())
        loss = run(part, policy_gradient, advantage, chunk_tokens=16, weight_grad=buffer).loss
        return loss * factor if after else loss

    loss = checkpoint(region, leaves.hidden, use_reentrant=reentrant)
    assert calls == [not reentrant]  # the losses of chunks make no checkpoint run again
    assert isinstance(loss, torch.Tensor)
    if after and not reentrant:  # what is computed after the call needs it a second time
        with pytest.raises(ValueError, match="weight_grad = given: a checkpoint computes this ag"):
            loss.backward()
        return
    loss.backward()
    torch.testing.assert_close(buffer, plain.weight.grad)
    torch.testing.assert_close(leaves.hidden.grad, plain.hidden.grad)
