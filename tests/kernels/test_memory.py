"""Logits of one chunk at a time, in every pass."""

from __future__ import annotations

import weakref

import pytest
import torch

from aepo_kernels import chunks, linear_logprob
from tests.kernels.oracle import make_case
from tests.kernels.test_token_loss import grpo_like, make_columns, run


@pytest.fixture
def most_alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many chunks' logits were in memory whenever another one's had just been made."""
    alive: list[weakref.ref] = []
    counts: list[int] = []
    products = chunks.Head.products

    def watched(self: chunks.Head, tokens: chunks.Tokens) -> torch.Tensor:
        made = products(self, tokens)
        alive.append(weakref.ref(made))
        counts.append(sum(reference() is not None for reference in alive))
        return made

    monkeypatch.setattr(chunks.Head, "products", watched)
    return counts


@pytest.mark.parametrize("weight_slice", [None, 50])
def test_token_loss(most_alive: list[int], weight_slice: int | None) -> None:
    case = make_case(60, 16, 200, option="all")
    leaves = case.fresh()
    columns = make_columns(case)
    run(leaves, grpo_like, *columns, chunk_tokens=10, weight_slice=weight_slice).loss.backward()
    assert len(most_alive) > 3 and max(most_alive) == 1


def test_logprob(most_alive: list[int]) -> None:
    case = make_case(60, 16, 200).fresh()
    output = linear_logprob(case.hidden, case.weight, case.targets, chunk_tokens=10)
    output.logprob.sum().backward()
    assert len(most_alive) == 12 and max(most_alive) == 1
