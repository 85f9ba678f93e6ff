"""linear_token_loss against float64 autograd of the same loss over materialised logits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from aepo_kernels import TokenLossOutput, linear_token_loss
from aepo_kernels.gemm import Gemms
from aepo_kernels.head import accumulators
from aepo_kernels.head.budget import Budget
from tests.kernels.budgets import token_loss_within
from tests.kernels.oracle import (
    IGNORED,
    Case,
    assert_as_accurate,
    make_case,
    materialised,
)

DTYPES = [torch.float32, torch.bfloat16]
BACKENDS = ["reference", "chunked"]


class Columns(NamedTuple):
    """Per-token inputs of the loss: [N]."""

    old_logprob: Tensor
    advantage: Tensor
    weight: Tensor


def grpo_like(
    logprob: Tensor,
    entropy: Tensor,
    second_logprob: Tensor | None,
    old_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate, entropy bonus and a REINFORCE term at the second temperature."""
    ratio = (logprob - old_logprob).clamp(max=20.0).exp()
    clipped = ratio.clamp(0.8, 1.28)
    per_token = -torch.minimum(ratio * advantage, clipped * advantage) - 0.01 * entropy
    if second_logprob is not None:
        per_token = per_token - 0.3 * (advantage > 0) * second_logprob
    return (weight * per_token).sum(), {
        "entropy": entropy.sum(),
        "clipped": (ratio != clipped).sum(),
    }


def policy_gradient(logprob: Tensor, entropy: Tensor, second: Tensor | None, adv: Tensor) -> Tensor:
    return -(adv * (logprob - logprob.detach()).exp()).sum()


def make_columns(case: Case, seed: int = 2) -> Columns:
    """Advantages around zero and old log-probs near the current ones, away from the clip edges."""
    num_tokens = len(case.hidden)
    rng = torch.Generator().manual_seed(seed)
    logprob = materialised(case.fresh(torch.float64))[0]
    assert logprob is not None
    log_ratio = torch.tensor([-0.5, -0.1, 0.0, 0.1, 0.5])
    picks = torch.randint(5, (num_tokens,), generator=rng)
    return Columns(
        old_logprob=logprob.detach().float() - log_ratio[picks],
        advantage=torch.randn(num_tokens, generator=rng),
        weight=torch.rand(num_tokens, generator=rng) / max(num_tokens, 1),
    )


def run(
    case: Case,
    loss: Any,
    *columns: Tensor,
    backend: str = "chunked",
    budget: Budget | None = None,
    **more: Any,
) -> Any:
    more.setdefault("chunk_tokens", 50)
    call = linear_token_loss if budget is None else partial(token_loss_within, budget)
    return call(
        case.hidden,
        case.weight,
        case.targets,
        loss,
        *columns,
        **case.keywords(),
        backend=backend,
        **more,
    )


def by_autograd(case: Case, loss: Any, *columns: Tensor) -> tuple[Tensor, dict, list[Tensor]]:
    keep = case.targets != IGNORED
    logprob, entropy, _, second = materialised(case)
    assert logprob is not None and entropy is not None
    kept = [x if x is None else x[keep] for x in (logprob, entropy, second)]
    result = loss(*kept, *(column.to(logprob.dtype)[keep] for column in columns))
    value, metrics = result if isinstance(result, tuple) else (result, {})
    return value, metrics, list(torch.autograd.grad(value, case.tensors()))


def check(case: Case, **more: Any) -> tuple[TokenLossOutput, dict]:
    """Loss and gradients of grpo_like against float64; returns the output and the true metrics."""
    columns = make_columns(case)
    exact, exact_metrics, truth = by_autograd(case.fresh(torch.float64), grpo_like, *columns)
    base_loss, _, base = by_autograd(case.fresh(), grpo_like, *columns)
    leaves = case.fresh()
    output = run(leaves, grpo_like, *columns, **more)
    assert_as_accurate(output.loss, base_loss, exact, "loss")
    grads = torch.autograd.grad(output.loss, leaves.tensors())
    for index, (ours, theirs, wanted) in enumerate(zip(grads, base, truth, strict=True)):
        assert ours.dtype == case.hidden.dtype
        assert_as_accurate(ours, theirs, wanted, f"gradient {index}")
    return output, exact_metrics


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "option"),
    [
        ((127, 64, 1000), "plain"),
        ((127, 64, 1000), "second"),
        ((127, 64, 1000), "all"),
        ((127, 64, 1000), "shift_up"),
        ((127, 64, 1000), "shift_down"),
        ((1388, 64, 1000), "all"),
        ((1, 576, 32000), "all"),
        ((127, 896, 1000), "token_temperature"),
    ],
    ids=str,
)
def test_matches_float64(shape: tuple, option: str, dtype: torch.dtype, backend: str) -> None:
    case = make_case(*shape, dtype=dtype, option=option, seed=3)
    output, exact_metrics = check(case, backend=backend)
    assert isinstance(output, TokenLossOutput) and output.backend == backend
    if dtype == torch.float32 and not option.startswith("shift"):
        for name, value in exact_metrics.items():
            torch.testing.assert_close(
                output.metrics[name].double(), value.double(), rtol=1e-5, atol=0
            )
    base_outputs = materialised(case)
    truth_outputs = materialised(case.fresh(torch.float64))
    for name, index in (("logprob", 0), ("entropy", 1), ("second_logprob", 3)):
        theirs, truth = base_outputs[index], truth_outputs[index]
        ours = getattr(output, name)
        assert (ours is None) == (truth is None)
        if truth is not None and theirs is not None:
            assert not ours.requires_grad
            assert_as_accurate(ours, theirs, truth, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", range(3), ids=["logprob", "entropy", "second_logprob"])
def test_loss_of_one_vector_alone(used: int, backend: str) -> None:
    case = make_case(60, 32, 200, option="all")
    column = torch.randn(60)

    def loss(*vectors: Tensor) -> Tensor:
        return (vectors[3] * vectors[used] ** 2).sum()

    _, _, expected = by_autograd(case.fresh(torch.float64), loss, column)
    _, _, base = by_autograd(case.fresh(), loss, column)
    leaves = case.fresh()
    grads = torch.autograd.grad(run(leaves, loss, column, backend=backend).loss, leaves.tensors())
    for ours, theirs, truth in zip(grads, base, expected, strict=True):
        assert_as_accurate(ours, theirs, truth, f"gradient of {used}")


@pytest.mark.parametrize("option", ["plain", "all"])
def test_gradcheck_of_the_reference(option: str) -> None:
    case = make_case(7, 5, 11, option=option).fresh(torch.float64)
    columns = make_columns(case)

    def loss(*tensors: Tensor) -> Tensor:
        bias = tensors[2] if len(tensors) == 3 else None
        fresh = Case(tensors[0], tensors[1], case.targets, bias, case.options)
        return run(fresh, grpo_like, *columns, backend="reference").loss

    assert torch.autograd.gradcheck(loss, case.tensors())


@pytest.mark.parametrize("option", ["plain", "all"])
def test_float64_agrees_to_float64_accuracy(option: str) -> None:
    case = make_case(60, 16, 100, option=option).fresh(torch.float64)
    columns = make_columns(case)
    expected, _, expected_grads = by_autograd(case, grpo_like, *columns)
    output = run(case, grpo_like, *columns, chunk_tokens=7)
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(output.loss, case.tensors())
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient_scales_every_gradient(backend: str) -> None:
    case = make_case(60, 32, 200, option="all")
    columns = make_columns(case)
    plain, scaled = case.fresh(), case.fresh()
    run(plain, grpo_like, *columns, backend=backend).loss.backward()
    (run(scaled, grpo_like, *columns, backend=backend).loss * -3.0 + 1.0).backward()
    for one, other in zip(plain.tensors(), scaled.tensors(), strict=True):
        assert one.grad is not None and other.grad is not None and one.grad.abs().max() > 0
        torch.testing.assert_close(other.grad, -3.0 * one.grad)


def test_losses_add_up_over_calls() -> None:
    case = make_case(60, 32, 200, option="all")
    columns = make_columns(case)
    leaves = case.fresh()
    for _ in range(2):
        run(leaves, grpo_like, *columns).loss.backward()
    twice = case.fresh()
    torch.stack([run(twice, grpo_like, *columns).loss for _ in range(2)]).sum().backward()
    for one, other in zip(leaves.tensors(), twice.tensors(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_second_backward_raises_instead_of_being_wrong() -> None:
    leaves = make_case(20, 8, 30).fresh()
    loss = run(leaves, policy_gradient, torch.randn(20)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_double_backward_raises() -> None:
    leaves = make_case(20, 8, 30).fresh()
    loss = run(leaves, policy_gradient, torch.randn(20)).loss
    for value in (loss, loss * loss):
        with pytest.raises(RuntimeError, match="create_graph=True, but its gradient has no deriv"):
            torch.autograd.grad(value, leaves.hidden, create_graph=True)


@pytest.mark.parametrize("option", ["plain", "ignored"])
def test_rows_with_zero_coefficients_are_left_out_exactly(option: str) -> None:
    case = make_case(120, 32, 200, option=option)
    advantage = torch.randn(120)
    advantage[torch.arange(0, 120, 3)] = 0.0
    advantage[50:100] = 0.0  # a whole chunk
    leaves = case.fresh()
    output = run(leaves, policy_gradient, advantage, chunk_tokens=20)
    output.loss.backward()
    active = (advantage != 0) & (case.targets != IGNORED)
    assert output.active_rows == active.sum()
    _, _, expected = by_autograd(case.fresh(torch.float64), policy_gradient, advantage)
    _, _, base = by_autograd(case.fresh(), policy_gradient, advantage)
    for tensor, theirs, truth in zip(leaves.tensors(), base, expected, strict=True):
        assert tensor.grad is not None
        assert_as_accurate(tensor.grad, theirs, truth, "gradient")
    assert leaves.hidden.grad is not None and (leaves.hidden.grad[~active] == 0).all()


def test_all_coefficients_zero_runs_no_gradient_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, accumulators.Gradients, "add")
    leaves = make_case(40, 8, 30, option="bias").fresh()
    output = run(leaves, policy_gradient, torch.zeros(40))
    output.loss.backward()
    assert output.active_rows == 0
    for tensor in leaves.tensors():
        assert tensor.grad is not None and torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_frozen_head_skips_its_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(60, 32, 200)
    advantage = torch.randn(60)
    whole, frozen = case.fresh(), case.fresh()
    run(whole, policy_gradient, advantage).loss.backward()
    frozen.weight.requires_grad_(False)
    forbid(monkeypatch, Gemms, "product")
    run(frozen, policy_gradient, advantage).loss.backward()
    assert frozen.weight.grad is None
    assert frozen.hidden.grad is not None and whole.hidden.grad is not None
    assert torch.equal(frozen.hidden.grad, whole.hidden.grad)


def test_no_grad_runs_only_the_first_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = make_case(60, 32, 200, option="all").fresh()
    columns = make_columns(leaves)
    expected = run(leaves, grpo_like, *columns)
    forbid(monkeypatch, accumulators.Gradients, "add")
    with torch.no_grad():
        output = run(leaves, grpo_like, *columns)
    assert not output.loss.requires_grad and output.active_rows == 0
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.logprob, expected.logprob)


def forbid(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    def called(*_: Any) -> None:
        raise AssertionError("a gradient GEMM ran")

    monkeypatch.setattr(owner, name, called)


def test_chunk_size_changes_neither_loss_nor_metrics_nor_gradients() -> None:
    case = make_case(127, 32, 200, option="all")
    columns = make_columns(case)
    results = []
    for chunk_tokens in (1, 10, 127, None):
        leaves = case.fresh()
        output = run(leaves, grpo_like, *columns, chunk_tokens=chunk_tokens)
        grads = torch.autograd.grad(output.loss, leaves.tensors())
        results.append([output.loss, *output.metrics.values(), output.logprob, *grads])
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_gradient_error_does_not_grow_with_the_number_of_chunks() -> None:
    # Contributions of one sign: a bfloat16 accumulator would stop moving after a few chunks.
    case = make_case(1388, 64, 1000, dtype=torch.bfloat16)
    case = replace(case, hidden=case.hidden.abs())
    advantage = torch.full((1388,), 0.1)
    _, _, expected = by_autograd(case.fresh(torch.float64), policy_gradient, advantage)
    _, _, base = by_autograd(case.fresh(), policy_gradient, advantage)
    leaves = case.fresh()
    output = run(leaves, policy_gradient, advantage, chunk_tokens=4)
    grads = torch.autograd.grad(output.loss, leaves.tensors())
    for ours, theirs, truth in zip(grads, base, expected, strict=True):
        assert_as_accurate(ours, theirs, truth, "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_no_token_that_counts_gives_a_connected_zero(num_tokens: int, backend: str) -> None:
    leaves = make_case(num_tokens, 8, 30, option="all").fresh()
    leaves.targets.fill_(IGNORED)
    output = run(leaves, policy_gradient, torch.randn(num_tokens), backend=backend)
    output.loss.backward()
    assert output.loss == 0 and output.metrics == {} and output.active_rows == 0
    assert torch.equal(output.logprob, torch.zeros(num_tokens))
    for tensor in leaves.tensors():
        assert tensor.grad is not None and torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_the_reference_connects_inputs_by_their_rows_alone() -> None:
    leaves = make_case(7, 32, 200).fresh()
    loss = run(leaves, lambda logprob, *_: logprob.sum(), backend="reference").loss
    names, nodes = set[str](), [loss.grad_fn]
    while nodes:
        node: Any = nodes.pop()
        names.add(node.name())
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert "torch::autograd::AccumulateGrad" in names
    assert "SliceBackward0" not in names  # that of no rows has a gradient of [V, H] zeros


def test_two_runs_are_bitwise_equal_and_read_no_uninitialised_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_case(100, 32, 200, option="all", dtype=torch.bfloat16)
    columns = make_columns(case)

    def results() -> list[Tensor]:
        leaves = case.fresh()
        output = run(leaves, grpo_like, *columns)
        grads = torch.autograd.grad(output.loss, leaves.tensors())
        return [output.loss, *output.metrics.values(), output.logprob, output.entropy, *grads]

    def poisoned(original):
        def make(*args, **kwargs):
            tensor = original(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return make

    expected = results()
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))


def test_a_loss_without_gradient_is_allowed() -> None:
    leaves = make_case(20, 8, 30).fresh()
    output = run(leaves, lambda logprob, *_: logprob.detach().sum())
    output.loss.backward()
    assert leaves.hidden.grad is not None and (leaves.hidden.grad == 0).all()
