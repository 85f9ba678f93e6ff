"""Micro-batch layouts: every layout gives each completion token the log-prob of a lone row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from aepo_fast.model.batch import (
    BATCH_TOKENS,
    GPU_BATCH_TOKENS,
    Layout,
    MicroBatch,
    make_microbatches,
)
from aepo_fast.samples import Completion, Row

LAYOUTS: tuple[Layout, ...] = ("packed", "shared", "padded")


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def make_rows(lengths: list[int], *, groups: int = 3, seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 250, (count,), generator=generator).tolist())

    prompts = [ids(3 + 4 * group) for group in range(groups)]
    rows = []
    for index, length in enumerate(lengths):
        completion = Completion(
            prompts[index % groups], ids(length), (0.0,) * length, "stop", 1.0, 0
        )
        rows.append(Row(completion, index % groups, False, 1.0))
    return rows


def lone_logprobs(model: PreTrainedModel, row: Row) -> torch.Tensor:
    prompt, completion = row.completion.prompt_ids, row.completion.completion_ids
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def batch_logprobs(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    logits = model(
        batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
    ).logits.flatten(0, 1)[batch.select]
    return torch.log_softmax(logits, -1).gather(1, batch.targets[:, None])[:, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_tokens", [1, 40, 1000])
def test_layouts_agree_with_lone_rows(
    model: PreTrainedModel, layout: Layout, max_tokens: int
) -> None:
    rows = make_rows([5, 1, 9, 2, 7, 1, 12, 3])
    seen = []
    for batch in make_microbatches(rows, range(len(rows)), layout=layout, max_tokens=max_tokens):
        actual = batch_logprobs(model, batch)
        for local, index in enumerate(batch.rows):
            mine = actual[batch.row_of_token == local]
            torch.testing.assert_close(
                mine, lone_logprobs(model, rows[index]), atol=2e-5, rtol=1e-5
            )
        seen += batch.rows
    assert sorted(seen) == list(range(len(rows)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_gradient_of_lone_rows(model: PreTrainedModel, layout: Layout) -> None:
    rows = make_rows([4, 1, 6, 3, 2])
    weights = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0])
    model.zero_grad()
    for row, weight in zip(rows, weights, strict=True):
        (weight * lone_logprobs(model, row).sum()).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for batch in make_microbatches(rows, range(5), layout=layout, max_tokens=30):
        coefficients = weights[torch.tensor(batch.rows)][batch.row_of_token]
        (coefficients * batch_logprobs(model, batch)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_token_budget_holds_where_rows_fit(layout: Layout) -> None:
    rows = make_rows([5, 1, 9, 2, 7, 1, 12, 3] * 4)
    for batch in make_microbatches(rows, range(len(rows)), layout=layout, max_tokens=64):
        assert batch.input_ids.numel() <= 64


def test_rows_of_other_lengths_are_not_padded_to_the_longest() -> None:
    rows = make_rows([400] + [30] * 20 + [29] * 20)
    batches = make_microbatches(rows, range(len(rows)), layout="padded", max_tokens=9999)
    assert [len(batch.rows) for batch in batches] == [1, 40]
    rows = make_rows([33, 32, 31, 30])
    (whole,) = make_microbatches(rows, range(4), layout="padded", max_tokens=9999)
    assert len(whole.rows) == 4


def test_micro_batches_that_cost_more_are_fewer() -> None:
    rows = make_rows([60] * 10 + [30] * 20)
    options = {"layout": "padded", "max_tokens": 9999}
    cheap, dear = (
        make_microbatches(rows, range(len(rows)), batch_tokens=cost, **options)
        for cost in (BATCH_TOKENS, GPU_BATCH_TOKENS)
    )
    assert [len(batch.rows) for batch in cheap] == [10, 20]
    assert [len(batch.rows) for batch in dear] == [30]
    assert (
        len(make_microbatches(rows, range(30), batch_tokens=10**6, layout="padded", max_tokens=900))
        > 1
    )


def test_sharing_prompts_processes_fewer_tokens() -> None:
    rows = make_rows([3] * 24)
    shared, padded = (
        sum(
            b.input_ids.numel() for b in make_microbatches(rows, range(24), layout=x, max_tokens=99)
        )
        for x in ("shared", "padded")
    )
    assert shared < padded / 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_input_and_empty_completions(layout: Layout) -> None:
    rows = make_rows([0, 2, 0])
    assert make_microbatches(rows, [], layout=layout, max_tokens=10) == []
    (batch,) = make_microbatches(rows, range(3), layout=layout, max_tokens=10)
    assert batch.rows == (1,) and batch.targets.tolist() == list(rows[1].completion.completion_ids)
