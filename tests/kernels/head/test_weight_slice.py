"""Gradients a slice of the vocabulary at a time: the same as a chunk of tokens at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from aepo_kernels import RowSampling, backends, linear_logprob, linear_token_loss
from aepo_kernels.cpu import library as cpu_library
from aepo_kernels.head import projection
from aepo_kernels.head.accumulators import Gradients
from aepo_kernels.head.budget import Budget
from aepo_kernels.head.stashed_logits import StashedLogits
from tests.kernels.head.test_lora import SCALE, factors
from tests.kernels.head.test_token_loss import (
    by_autograd,
    check,
    make_columns,
    policy_gradient,
    run,
)
from tests.kernels.oracle import (
    OPTIONS,
    Case,
    assert_as_accurate,
    make_case,
    materialised,
    output_weights,
    weighted_gradients,
)

needs_cpp = pytest.mark.skipif(
    cpu_library.unavailable_reason() is not None, reason="torch's row operations know whole rows"
)

ROWS = pytest.mark.parametrize("rows", ["all active", "active first", "some without coefficients"])
DTYPES = pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        pytest.param(torch.float32, torch.float32, marks=needs_cpp),
    ],
    ids=str,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_token_loss_matches_float64(option: str, dtype: torch.dtype) -> None:
    case = make_case(127, 64, 1000, dtype=dtype, option=option, seed=3)
    check(case, weight_slice=300)


@pytest.mark.usefixtures("layout")
@ROWS
@DTYPES
@pytest.mark.parametrize("option", ["plain", "all"])
def test_a_cpu_takes_slices_unasked(
    option: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    rows: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 32 tokens a chunk, some 400 rows of the vocabulary a slice; the last chunk's logits are kept.
    budget = Budget(chunk_bytes=2 * 1000 * 32, slice_bytes=2**16)
    slices: list[int] = []
    add_slice = Gradients.add_slice
    monkeypatch.setattr(
        Gradients, "add_slice", lambda self, *a: slices.append(1) or add_slice(self, *a)
    )
    case = make_case(127, 64, 1000, dtype=dtype, option=option, seed=3)
    check_unasked(case, weight_dtype, rows, budget)
    assert len(slices) >= 2


def check_unasked(case: Case, weight_dtype: torch.dtype, rows: str, budget: Budget) -> None:
    """Gradients of a policy gradient that names no sizes; `rows` says which tokens have one."""
    advantage, more = make_columns(case).advantage, {}
    if rows != "all active":
        passive = torch.arange(len(advantage)) % 3 == 0
        advantage = advantage.masked_fill(passive, 0)
        if rows == "active first":
            more["active"] = (~passive).nonzero().squeeze(1)
    _, _, truth = by_autograd(case.fresh(torch.float64), policy_gradient, advantage)
    _, _, base = by_autograd(case.fresh(), policy_gradient, advantage)
    leaves = case.fresh()
    leaves = replace(leaves, weight=leaves.weight.detach().to(weight_dtype).requires_grad_())
    output = run(leaves, policy_gradient, advantage, budget=budget, chunk_tokens=None, **more)
    grads = torch.autograd.grad(output.loss, leaves.tensors())
    assert grads[1].dtype == weight_dtype
    for index, (ours, theirs, wanted) in enumerate(zip(grads, base, truth, strict=True)):
        assert_as_accurate(ours, theirs, wanted, f"gradient {index}")


@needs_cpp
@pytest.mark.parametrize(
    ("tokens", "again", "upcast_again"),
    [(64, 0, 0), (80, 0, 0), (110, 14, 0), (160, 64, 12)],
)
def test_on_a_cpu_few_logits_are_made_twice(
    tokens: int, again: int, upcast_again: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 64 tokens' logits wait in the gradient of a weight of 64 columns, those of the last chunk of
    # at most 32 where they are. If column-major, half the budget is for a row-major copy; upcast
    # GEMMs' logits are as wide as a float32 weight. Of more than would fit, twice as many wait
    # there as float16, and 20 beside.
    chunk = 2 * 1000 * 32 * (1 if layout == "rows" else 2)
    chunk += Budget.gemm_bytes if layout == "upcast" else 0
    budget = Budget(stash_bytes=2 * 1000 * 20, chunk_bytes=chunk)
    made: list[int] = []
    raw_logits = projection.Head.raw_logits

    def counted(self: projection.Head, *arguments: Any) -> torch.Tensor:
        result = raw_logits(self, *arguments)
        made.append(result.numel())
        return result

    monkeypatch.setattr(projection.Head, "raw_logits", counted)
    leaves = make_case(tokens, 64, 1000, dtype=torch.bfloat16).fresh()
    if layout == "upcast":
        leaves = replace(leaves, weight=leaves.weight.detach().float().requires_grad_())
    output = run(leaves, policy_gradient, torch.randn(tokens), budget=budget, chunk_tokens=None)
    output.loss.backward()
    assert sum(made) == (tokens + (upcast_again if layout == "upcast" else again)) * 1000


@needs_cpp
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1, 6])  # of logits: the likeliest token has 1 % and 97 %
def test_what_waits_as_float16_keeps_its_accuracy(
    size: int, weight_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_cpu_multiplies_bfloat16", lambda: False)
    budget = Budget(chunk_bytes=Budget.gemm_bytes + 4 * 3000 * 16)
    stashes: list[StashedLogits] = []
    read = StashedLogits.read
    monkeypatch.setattr(
        StashedLogits, "read", lambda self, *a: stashes.append(self) or read(self, *a)
    )
    case = make_case(200, 64, 3000, dtype=torch.bfloat16, seed=5)
    case = replace(case, weight=size * case.weight)
    case = replace(case, targets=(case.hidden.float() @ case.weight.float().T).argmax(1))
    advantage = torch.randn(200, generator=torch.Generator().manual_seed(0))
    _, _, truth = by_autograd(case.fresh(torch.float64), policy_gradient, advantage)
    leaves = case.fresh()
    leaves = replace(leaves, weight=leaves.weight.detach().to(weight_dtype).requires_grad_())
    output = run(leaves, policy_gradient, advantage, budget=budget, chunk_tokens=None)
    for grad, wanted in zip(torch.autograd.grad(output.loss, leaves.tensors()), truth, strict=True):
        error = (grad.double() - wanted).norm() / wanted.norm()
        assert error <= (1e-4 if grad.dtype == torch.float32 else 2e-3)  # bfloat16's rounding
    assert stashes and all(stash.memory.dtype == torch.float16 for stash in stashes)


@pytest.mark.parametrize("weight_slice", [1, 64, 300, 5000])
def test_logprob_matches_float64(weight_slice: int) -> None:
    case = make_case(40, 16, 300, option="all")
    weights = output_weights(40)
    exact, base, ours = case.fresh(torch.float64), case.fresh(), case.fresh()
    truth = weighted_gradients(exact, materialised(exact), weights)
    theirs = weighted_gradients(base, materialised(base), weights)
    output = linear_logprob(
        ours.hidden, ours.weight, ours.targets, **ours.keywords(), weight_slice=weight_slice
    )
    grads = weighted_gradients(ours, output[:4], weights)
    for one, other, wanted in zip(grads, theirs, truth, strict=True):
        assert_as_accurate(one, other, wanted, "gradient")


def test_low_rank_heads_and_rows_without_a_coefficient() -> None:
    case = make_case(60, 16, 200, option="ignored")
    advantage = torch.randn(60)
    advantage[::2] = 0.0
    results = []
    for names in ({"weight_slice": 70}, {}):
        leaves, (lora_a, lora_b) = case.fresh(), factors(case, 3, torch.float32)
        low: dict[str, Any] = {"lora_a": lora_a, "lora_b": lora_b, "lora_scale": SCALE}
        output = run(leaves, policy_gradient, advantage, **low, **names)
        inputs = [leaves.hidden, leaves.weight, lora_a, lora_b]
        results.append([output.active_rows, *torch.autograd.grad(output.loss, inputs)])
    assert results[0][0] == results[1][0] > 0
    for ours, theirs in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_no_row_with_a_gradient_gives_zeros() -> None:
    leaves = make_case(20, 8, 30).fresh()
    run(leaves, policy_gradient, torch.zeros(20), weight_slice=7).loss.backward()
    assert leaves.weight.grad is not None and (leaves.weight.grad == 0).all()
    assert leaves.hidden.grad is not None and (leaves.hidden.grad == 0).all()


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ({"weight_slice": 0}, "weight_slice = 0: must be at least 1"),
        ({"weight_slice": 5, "backend": "reference"}, "reference has no slices"),
        ({"weight_slice": 5, "row_sampling": RowSampling(0.1)}, "row_sampling does; drop one"),
        ({"weight_slice": 5, "weight_grad": torch.zeros(30, 8)}, "weight_grad does; drop one"),
    ],
)
def test_what_goes_by_whole_rows_is_refused(names: dict[str, Any], reason: str) -> None:
    leaves = make_case(20, 8, 30).fresh()
    with pytest.raises(ValueError, match=reason):
        run(leaves, policy_gradient, torch.randn(20), **names)


@pytest.mark.parametrize(
    ("hidden", "weight"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)],
    ids=str,
)
@pytest.mark.usefixtures("layout")
def test_weights_of_a_dtype_that_no_gemm_writes(hidden: torch.dtype, weight: torch.dtype) -> None:
    case, grads = make_case(40, 16, 200), []
    for size in (None, 64):
        leaves = [case.hidden.to(hidden), case.weight.to(weight)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        run = linear_token_loss(
            *leaves, case.targets, lambda logprob, *_: logprob.sum(), weight_slice=size
        )
        run.loss.backward()
        grads.append([leaf.grad for leaf in leaves])
    for one, other, leaf in zip(*grads, leaves, strict=True):
        assert one.dtype == other.dtype == leaf.dtype
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
