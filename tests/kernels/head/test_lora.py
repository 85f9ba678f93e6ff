"""A head with a low-rank part: values and gradients of the weight that never exists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aepo_kernels import linear_logprob
from tests.kernels.head.test_token_loss import grpo_like, make_columns, run
from tests.kernels.oracle import (
    Case,
    assert_as_accurate,
    make_case,
    materialised,
    output_weights,
    weighted_gradients,
)

SCALE = 0.5


def factors(case: Case, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(rank)
    vocab, hidden_size = case.weight.shape
    lora_a = torch.randn(rank, hidden_size, generator=rng) / hidden_size**0.5
    lora_b = torch.randn(vocab, rank, generator=rng)
    return (
        lora_a.to(dtype).requires_grad_(),
        lora_b.to(dtype).requires_grad_(),
    )


def merged(case: Case, lora_a: Tensor, lora_b: Tensor) -> Case:
    weight = case.weight + SCALE * lora_b.to(case.weight.dtype) @ lora_a.to(case.weight.dtype)
    return Case(case.hidden, weight, case.targets, case.bias, case.options)


def by_merging(case: Case, rank: int, dtype: torch.dtype) -> tuple[list, list[Tensor]]:
    leaves = case.fresh(dtype)
    low = factors(case, rank, dtype)
    outputs = materialised(merged(leaves, *low))
    terms = zip(outputs, output_weights(len(case.hidden)), strict=True)
    total = torch.stack([(w * x).sum() for x, w in terms if x is not None]).sum()
    return outputs, list(torch.autograd.grad(total, [*leaves.tensors(), *low]))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", ["plain", "all"])
def test_matches_the_merged_weight(option: str, dtype: torch.dtype, backend: str) -> None:
    case = make_case(127, 64, 1000, dtype=dtype, option=option)
    truth, truth_grads = by_merging(case, 8, torch.float64)
    base, base_grads = by_merging(case, 8, dtype)
    leaves, (lora_a, lora_b) = case.fresh(), factors(case, 8, dtype)
    output = linear_logprob(
        leaves.hidden,
        leaves.weight,
        leaves.targets,
        **leaves.keywords(),
        lora_a=lora_a,
        lora_b=lora_b,
        lora_scale=SCALE,
        backend=backend,
        chunk_tokens=50,
    )
    for ours, theirs, exact in zip(output[:4], base, truth, strict=True):
        if exact is not None:
            assert_as_accurate(ours, theirs, exact, "output")
    weighted = zip(output[:4], output_weights(127), strict=True)
    total = torch.stack([(w * x).sum() for x, w in weighted if x is not None]).sum()
    grads = torch.autograd.grad(total, [*leaves.tensors(), lora_a, lora_b])
    for index, (ours, theirs, exact) in enumerate(zip(grads, base_grads, truth_grads, strict=True)):
        assert ours.dtype == dtype
        assert_as_accurate(ours, theirs, exact, f"gradient {index}")


def test_token_loss_trains_the_factors_under_a_frozen_weight() -> None:
    case = make_case(60, 32, 200, option="all")
    columns = make_columns(case)
    low = factors(case, 4, torch.float32)
    frozen = case.fresh()
    frozen.weight.requires_grad_(False)
    names: dict[str, Any] = {"lora_a": low[0], "lora_b": low[1], "lora_scale": SCALE}
    output = run(frozen, grpo_like, *columns, chunk_tokens=25, **names)
    output.loss.backward()
    assert frozen.weight.grad is None
    exact_low = factors(case, 4, torch.float64)
    whole = merged(case.fresh(torch.float64), *exact_low)
    keep = case.targets != -100
    logprob, entropy, _, second = materialised(whole)
    kept = [x if x is None else x[keep] for x in (logprob, entropy, second)]
    loss, _ = grpo_like(*kept, *(column.double()[keep] for column in columns))  # type: ignore[arg-type]
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-5, atol=1e-6)
    for ours, exact in zip(low, torch.autograd.grad(loss, exact_low), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.double(), exact, rtol=1e-4, atol=1e-5)


def test_no_tokens_give_connected_zeros() -> None:
    case = make_case(0, 8, 30).fresh()
    lora_a, lora_b = factors(case, 2, torch.float32)
    output = linear_logprob(case.hidden, case.weight, case.targets, lora_a=lora_a, lora_b=lora_b)
    weighted_gradients(case, output[:4], output_weights(0))
    output = linear_logprob(case.hidden, case.weight, case.targets, lora_a=lora_a, lora_b=lora_b)
    output.logprob.sum().backward()
    assert lora_a.grad is not None and (lora_a.grad == 0).all()
    assert lora_b.grad is not None and (lora_b.grad == 0).all()


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ({"lora_a": torch.zeros(2, 8)}, "lora_b = None: the other one is given"),
        ({"lora_b": torch.zeros(30, 2)}, "lora_a = None: the other one is given"),
        ({"lora_a": torch.zeros(2, 9), "lora_b": torch.zeros(30, 2)}, r"lora_a .* \[2, 8\]"),
        ({"lora_a": torch.zeros(2, 8), "lora_b": torch.zeros(30, 3)}, r"lora_b .* \[30, 2\]"),
    ],
)
def test_bad_factors_raise(names: dict[str, Tensor], reason: str) -> None:
    case = make_case(5, 8, 30)
    with pytest.raises(ValueError, match=reason):
        linear_logprob(case.hidden, case.weight, case.targets, **names)
