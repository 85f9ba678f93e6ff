"""Micro-batch layouts: every layout gives each completion token the log-prob of a lone sample."""

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
from aepo_fast.samples import Completion, Sample

LAYOUTS: tuple[Layout, ...] = ("packed", "shared", "padded")


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def make_samples(lengths: list[int], *, groups: int = 3, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 250, (count,), generator=generator).tolist())

    prompts = [ids(3 + 4 * group) for group in range(groups)]
    samples = []
    for index, length in enumerate(lengths):
        completion = Completion(
            prompts[index % groups], ids(length), (0.0,) * length, "stop", 1.0, 0
        )
        samples.append(Sample(completion, index % groups, False, 1.0))
    return samples


def lone_logprobs(model: PreTrainedModel, sample: Sample) -> torch.Tensor:
    prompt, completion = sample.completion.prompt_ids, sample.completion.completion_ids
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
    samples = make_samples([5, 1, 9, 2, 7, 1, 12, 3])
    seen = []
    for batch in make_microbatches(
        samples, range(len(samples)), layout=layout, max_tokens=max_tokens
    ):
        actual = batch_logprobs(model, batch)
        for local, index in enumerate(batch.samples):
            mine = actual[batch.sample_of_token == local]
            torch.testing.assert_close(
                mine, lone_logprobs(model, samples[index]), atol=2e-5, rtol=1e-5
            )
        seen += batch.samples
    assert sorted(seen) == list(range(len(samples)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_gradient_of_lone_rows(model: PreTrainedModel, layout: Layout) -> None:
    samples = make_samples([4, 1, 6, 3, 2])
    weights = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0])
    model.zero_grad()
    for sample, weight in zip(samples, weights, strict=True):
        (weight * lone_logprobs(model, sample).sum()).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for batch in make_microbatches(samples, range(5), layout=layout, max_tokens=30):
        coefficients = weights[torch.tensor(batch.samples)][batch.sample_of_token]
        (coefficients * batch_logprobs(model, batch)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_token_budget_holds_where_rows_fit(layout: Layout) -> None:
    samples = make_samples([5, 1, 9, 2, 7, 1, 12, 3] * 4)
    for batch in make_microbatches(samples, range(len(samples)), layout=layout, max_tokens=64):
        assert batch.input_ids.numel() <= 64


def test_rows_of_other_lengths_are_not_padded_to_the_longest() -> None:
    samples = make_samples([400] + [30] * 20 + [29] * 20)
    batches = make_microbatches(samples, range(len(samples)), layout="padded", max_tokens=9999)
    assert [len(batch.samples) for batch in batches] == [1, 40]
    samples = make_samples([33, 32, 31, 30])
    (whole,) = make_microbatches(samples, range(4), layout="padded", max_tokens=9999)
    assert len(whole.samples) == 4


def test_micro_batches_that_cost_more_are_fewer() -> None:
    samples = make_samples([60] * 10 + [30] * 20)
    options = {"layout": "padded", "max_tokens": 9999}
    cheap, dear = (
        make_microbatches(samples, range(len(samples)), batch_tokens=cost, **options)
        for cost in (BATCH_TOKENS, GPU_BATCH_TOKENS)
    )
    assert [len(batch.samples) for batch in cheap] == [10, 20]
    assert [len(batch.samples) for batch in dear] == [30]
    assert (
        len(
            make_microbatches(
                samples, range(30), batch_tokens=10**6, layout="padded", max_tokens=900
            )
        )
        > 1
    )


def test_sharing_prompts_processes_fewer_tokens() -> None:
    samples = make_samples([3] * 24)
    shared, padded = (
        sum(
            b.input_ids.numel()
            for b in make_microbatches(samples, range(24), layout=x, max_tokens=99)
        )
        for x in ("shared", "padded")
    )
    assert shared < padded / 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_input_and_empty_completions(layout: Layout) -> None:
    samples = make_samples([0, 2, 0])
    assert make_microbatches(samples, [], layout=layout, max_tokens=10) == []
    (batch,) = make_microbatches(samples, range(3), layout=layout, max_tokens=10)
    assert batch.samples == (1,) and batch.targets.tolist() == list(
        samples[1].completion.completion_ids
    )
