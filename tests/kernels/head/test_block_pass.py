"""Gradients of many tokens on a CPU, by blocks: the same as those of all tokens at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aepo_kernels.head.block_pass import Blocks
from aepo_kernels.head.budget import Budget
from tests.kernels.budgets import logprob_within
from tests.kernels.head.test_lora import SCALE, factors
from tests.kernels.head.test_token_loss import policy_gradient, run
from tests.kernels.head.test_weight_slice import DTYPES, ROWS, check_unasked
from tests.kernels.oracle import (
    assert_as_accurate,
    make_case,
    materialised,
    output_weights,
    weighted_gradients,
)

TOKENS, WIDTH = 200, 64
# With a budget for the sums of 64 tokens, a large weight lends room for all others, a small one
# several times for some of them.
# So little memory that there are several blocks both ways.
BUDGET = Budget(
    chunk_bytes=2 * 100 * 32,
    sum_bytes=0,
    block_tokens=64,
    block_weight_bytes=4 * WIDTH * 64,
    block_sum_bytes=4 * WIDTH * 64,
)
VOCABS = {"one set": 1000, "several sets": 100}


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[Blocks]:
    """The blocks that were taken."""
    taken: list[Blocks] = []
    add = Blocks.add
    monkeypatch.setattr(Blocks, "add", lambda self: taken.append(self) or add(self))
    return taken


@pytest.mark.usefixtures("layout")
@ROWS
@pytest.mark.parametrize("vocab", VOCABS.values(), ids=VOCABS)
@pytest.mark.parametrize("option", ["plain", "all"])
@DTYPES
def test_token_loss_matches_float64(
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    option: str,
    vocab: int,
    rows: str,
    blocks: list[Blocks],
) -> None:
    case = make_case(TOKENS, WIDTH, vocab, dtype=dtype, option=option, seed=3)
    check_unasked(case, weight_dtype, rows, BUDGET)
    assert [(taken.block, taken.slice) for taken in blocks] == [(64, 64)]


@pytest.mark.parametrize("vocab", VOCABS.values(), ids=VOCABS)
def test_logprob_matches_float64(vocab: int, blocks: list[Blocks]) -> None:
    case = make_case(TOKENS, WIDTH, vocab, dtype=torch.bfloat16, option="all")
    weights = output_weights(TOKENS)
    exact, base, ours = case.fresh(torch.float64), case.fresh(), case.fresh()
    truth = weighted_gradients(exact, materialised(exact), weights)
    theirs = weighted_gradients(base, materialised(base), weights)
    output = logprob_within(BUDGET, ours.hidden, ours.weight, ours.targets, **ours.keywords())
    grads = weighted_gradients(ours, output[:4], weights)
    assert len(blocks) == 1
    for one, other, wanted in zip(grads, theirs, truth, strict=True):
        assert_as_accurate(one, other, wanted, "gradient")


@pytest.mark.parametrize("with_hidden", [True, False])
@pytest.mark.parametrize("vocab", VOCABS.values(), ids=VOCABS)
def test_low_rank_heads(vocab: int, with_hidden: bool, blocks: list[Blocks]) -> None:
    case = make_case(TOKENS, WIDTH, vocab, option="all")

    def gradients(dtype: torch.dtype, budget: Budget) -> tuple[Tensor, ...]:
        leaves, low = case.fresh(dtype), factors(case, 3, dtype)
        names: dict[str, Any] = {"lora_a": low[0], "lora_b": low[1], "lora_scale": SCALE}
        inputs = [*leaves.tensors(), *low]
        if not with_hidden:
            leaves.hidden.requires_grad_(False)
            inputs = inputs[1:]
        advantage = torch.ones(TOKENS)
        output = run(leaves, policy_gradient, advantage, budget=budget, weight_slice=70, **names)
        return torch.autograd.grad(output.loss, inputs)

    by_blocks = gradients(torch.float32, BUDGET)
    assert len(blocks) == 1
    roomy = replace(BUDGET, sum_bytes=2**40)
    base, truth = gradients(torch.float32, roomy), gradients(torch.float64, roomy)
    assert len(blocks) == 1
    for ours, theirs, wanted in zip(by_blocks, base, truth, strict=True):
        assert_as_accurate(ours, theirs, wanted, "gradient")


def test_no_row_with_a_gradient_gives_zeros(blocks: list[Blocks]) -> None:
    leaves = make_case(TOKENS, WIDTH, 1000, dtype=torch.bfloat16).fresh()
    output = run(leaves, policy_gradient, torch.zeros(TOKENS), budget=BUDGET, chunk_tokens=None)
    output.loss.backward()
    assert not blocks
    assert leaves.weight.grad is not None and (leaves.weight.grad == 0).all()
    assert leaves.hidden.grad is not None and (leaves.hidden.grad == 0).all()
