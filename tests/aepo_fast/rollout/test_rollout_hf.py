"""The hf rollout engine against transformers' own generate and forward."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from aepo_fast.config.sections import ModelConfig
from aepo_fast.model.load import load_model
from aepo_fast.rollout.engine import BrokenWeightsError, RolloutError
from aepo_fast.rollout.hf import HfRollout, sample_tokens
from aepo_fast.rollout.packed_linear import PackedLinear, can_pack, packed_linears
from aepo_fast.samples import Completion, Request
from aepo_kernels.cpu import layers
from tests.tiny_run import a_machine

BFLOAT16 = a_machine(compute=torch.bfloat16)
PROMPTS = [(5, 6, 7), (9,), (11, 12, 13, 14, 15, 16)]


@pytest.fixture
def model(tiny_model_dir: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    # Larger weights: a distribution far from uniform that depends on the context.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(12 if parameter.shape[0] != model.config.vocab_size else 4)
    return model


def engine_of(
    model: PreTrainedModel, *, eos: tuple[int, ...] = (), batch_rows: int = 64
) -> HfRollout:
    return HfRollout(model, a_machine(), eos_ids=eos, batch_rows=batch_rows)


def logprobs_of(model: PreTrainedModel, completion: Completion) -> torch.Tensor:
    ids = torch.tensor([completion.prompt_ids + completion.completion_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, len(completion.prompt_ids) - 1 : -1].double()
    logprobs = torch.log_softmax(logits / completion.temperature, -1)
    return logprobs.gather(1, torch.tensor(completion.completion_ids)[:, None])[:, 0]


def test_nearly_greedy_sampling_equals_transformers_generate(model: PreTrainedModel) -> None:
    requests = [Request(prompt, 1, 1e-4, seed=3) for prompt in PROMPTS]
    results = engine_of(model).generate(requests, max_new_tokens=12)
    for prompt, (completion,) in zip(PROMPTS, results, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=-1,
        )[0, len(prompt) :]
        assert completion.completion_ids == tuple(expected.tolist())


def test_temperature_zero_is_greedy_beside_samples_of_others(model: PreTrainedModel) -> None:
    requests = [Request(PROMPTS[0], 1, 0.0, 3), Request(PROMPTS[1], 2, 1.0, 7)]
    (greedy,), sampled = engine_of(model).generate(requests, max_new_tokens=12)
    nearly = engine_of(model).generate([Request(PROMPTS[0], 1, 1e-4, 3)], max_new_tokens=12)[0][0]
    assert greedy.completion_ids == nearly.completion_ids
    expected = logprobs_of(model, replace(greedy, temperature=1.0))
    torch.testing.assert_close(
        torch.tensor(greedy.logprobs, dtype=torch.float64), expected, atol=2e-5, rtol=0
    )
    alone = engine_of(model).generate([Request(PROMPTS[1], 2, 1.0, 7)], max_new_tokens=12)[0]
    assert [one.completion_ids for one in sampled] == [one.completion_ids for one in alone]


@pytest.mark.parametrize("in_cpp", [False, True])
def test_top_p_draws_from_the_fewest_tokens_that_hold_it(in_cpp: bool) -> None:
    """Against the definition, token by token in float64, at many points of the distribution."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(2)) * 2
    points = (torch.arange(500) + 0.5) / 500
    for top_p, temperature in ((0.5, 1.0), (0.9, 0.7), (1e-9, 1.0), (1.0, 1.3)):
        probs = torch.softmax(logits[0].double() / temperature, 0)
        kept: list[int] = []
        for token in probs.argsort(descending=True).tolist():
            if probs[kept].sum() < top_p:
                kept.append(token)
        ids, logprobs = sample_tokens(
            logits.expand(500, -1),
            torch.full((500,), temperature),
            points,
            in_cpp=in_cpp,
            top_p=torch.full((500,), top_p),
        )
        assert set(ids.tolist()) <= set(kept)
        shares = torch.bincount(ids, minlength=40) / 500
        law = torch.zeros(40, dtype=torch.float64)
        law[kept] = probs[kept] / probs[kept].sum()
        assert (shares - law).abs().max() <= 2 / 500
        torch.testing.assert_close(logprobs.double(), law[ids].log(), atol=2e-6, rtol=0)


def test_top_p_and_temperature_zero_refuse_logits_that_are_not_finite() -> None:
    logits = torch.tensor([[0.0, float("nan"), 1.0]])
    for temperature, top_p in ((0.0, None), (1.0, torch.tensor([0.5]))):
        at, point = torch.tensor([temperature]), torch.tensor([0.5])
        with pytest.raises(BrokenWeightsError, match="not finite"):
            sample_tokens(logits, at, point, in_cpp=False, top_p=top_p)


def test_logprobs_are_those_of_the_sampling_law(model: PreTrainedModel) -> None:
    requests = [Request(PROMPTS[0], 3, 0.7, 1), Request(PROMPTS[2], 2, 1.3, 2)]
    for group in engine_of(model).generate(requests, max_new_tokens=9):
        for completion in group:
            expected = logprobs_of(model, completion)
            actual = torch.tensor(completion.logprobs, dtype=torch.float64)
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def test_a_sample_does_not_depend_on_its_neighbours(model: PreTrainedModel) -> None:
    alone = engine_of(model).generate([Request(PROMPTS[1], 2, 1.0, 7)], max_new_tokens=10)[0]
    requests = [Request(PROMPTS[2], 3, 1.5, 1), Request(PROMPTS[1], 2, 1.0, 7)]
    for rows in (1, 2, 64):
        together = engine_of(model, batch_rows=rows).generate(requests, max_new_tokens=10)[1]
        assert [c.completion_ids for c in together] == [c.completion_ids for c in alone]
    assert alone[0].completion_ids != alone[1].completion_ids


@pytest.mark.skipif(not a_machine().runs_cpp, reason="installed without the C++ part")
def test_single_tokens_are_decoded_in_cpp(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, decode = [], layers.decode_attention
    monkeypatch.setattr(
        layers, "decode_attention", lambda *states: calls.append(states) or decode(*states)
    )
    for name in ("grouped", "sdpa"):
        cfg = ModelConfig(path=str(tiny_model_dir), attention=name, compute_dtype="float32")
        model = load_model(cfg, tiny_model_dir, a_machine())
        calls.clear()
        engine_of(model).generate([Request(PROMPTS[0], 2, 1.0, 0)], max_new_tokens=4)
        layers_of_model = model.config.num_hidden_layers
        assert len(calls) == (3 * layers_of_model if name == "grouped" else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_read_in_place_and_a_shared_beginning_change_nothing(
    tiny_model_dir: Path, dtype: torch.dtype
) -> None:
    cfg = ModelConfig(path=str(tiny_model_dir), attention="grouped", compute_dtype="bfloat16")
    model = load_model(cfg, tiny_model_dir, a_machine(compute=torch.bfloat16))
    start = tuple(range(20, 32))
    requests = [Request((*start, *end), 6, 1.0, 2) for end in ((5, 6, 7), (9,), (11, 12))]
    engine = HfRollout(model, a_machine(compute=dtype), eos_ids=range(40), batch_rows=64)
    found = [c for group in engine.generate(requests, max_new_tokens=12) for c in group]
    assert len({len(completion.completion_ids) for completion in found}) > 2  # rows were dropped
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for completion in found:
        expected = logprobs_of(plain, completion)
        actual = torch.tensor(completion.logprobs, dtype=torch.float64)
        tolerance = 2e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("attention", ["grouped", "eager"])  # whose cache grows in place, or not
def test_rows_that_are_the_same_so_far_are_computed_once(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    cfg = ModelConfig(path=str(tiny_model_dir), attention=attention, compute_dtype="float32")
    model = load_model(cfg, tiny_model_dir, a_machine())
    forward, sizes = HfRollout._forward, []
    monkeypatch.setattr(
        HfRollout,
        "_forward",
        lambda self, ids, *rest: sizes.append(len(ids)) or forward(self, ids, *rest),
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(9)  # few likely tokens: rows part one by one
    requests = [Request(prompt, 12, 1.0, 2) for prompt in PROMPTS]
    groups = engine_of(model).generate(requests, max_new_tokens=10)
    found = [(group, c.completion_ids) for group, many in enumerate(groups) for c in many]
    distinct = [len({(group, ids[:step]) for group, ids in found}) for step in range(10)]
    assert sizes == distinct and len(PROMPTS) < distinct[2] < distinct[9] < len(found)
    for group in groups:
        for completion in group:
            expected = logprobs_of(model, completion)
            actual = torch.tensor(completion.logprobs, dtype=torch.float64)
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_the_same_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip(f"this processor has no GEMMs of packed {dtype} weights")
    packed = copy.deepcopy(model).to(dtype)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = packed(ids).logits
        for linear in packed_linears(packed):
            linear.pack()
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(packed(ids).logits, expected, atol=tolerance, rtol=tolerance)


def test_the_trainers_own_weights_are_not_copied_and_its_layers_stay(
    model: PreTrainedModel,
) -> None:
    engine = engine_of(model)
    for ours, theirs in zip(engine.model.parameters(), model.parameters(), strict=True):
        assert ours is theirs
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    request = [Request(PROMPTS[0], 1, 1e-4, 0)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std())
    engine.sync_weights(model, 1)
    fresh = engine_of(model).generate(request, max_new_tokens=6)
    assert engine.generate(request, max_new_tokens=6)[0][0].logprobs == fresh[0][0].logprobs


def test_rows_stop_at_any_end_token_and_truncation_is_flagged(model: PreTrainedModel) -> None:
    free = engine_of(model).generate([Request(PROMPTS[0], 8, 1.0, 5)], max_new_tokens=12)[0]
    eos = (free[0].completion_ids[3], free[1].completion_ids[6])
    counted: list[int] = []
    stopped = engine_of(model, eos=eos).generate(
        [Request(PROMPTS[0], 8, 1.0, 5)], max_new_tokens=12, on_tokens=counted.append
    )[0]
    reasons = set()
    for long, short in zip(free, stopped, strict=True):
        ends = [index for index, token in enumerate(long.completion_ids) if token in eos]
        length = ends[0] + 1 if ends else 12
        assert short.completion_ids == long.completion_ids[:length]
        assert short.finish_reason == ("stop" if ends else "length")
        reasons.add(short.finish_reason)
    assert reasons == {"stop", "length"}
    assert sum(counted) == sum(len(c.completion_ids) for c in stopped)


def test_sync_brings_new_weights_into_the_copy(model: PreTrainedModel) -> None:
    engine = HfRollout(model, BFLOAT16, eos_ids=(), batch_rows=8)
    request = [Request(PROMPTS[0], 1, 1e-4, 0)]
    before = engine.generate(request, max_new_tokens=6)[0][0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std())
    stale = engine.generate(request, max_new_tokens=6)[0][0]
    assert stale.completion_ids == before.completion_ids and stale.weights_version == 0
    engine.sync_weights(model, 4)
    fresh = engine.generate(request, max_new_tokens=6)[0][0]
    assert fresh.weights_version == 4
    assert fresh.completion_ids != before.completion_ids
    for ours, theirs in zip(engine.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())


@pytest.fixture(params=["torch", "c++"])
def in_cpp(request: pytest.FixtureRequest) -> bool:
    if request.param == "c++" and not a_machine().runs_cpp:
        pytest.skip("installed without the C++ part")
    return request.param == "c++"


def test_sampled_tokens_follow_the_distribution(in_cpp: bool) -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, float("-inf"), 1.0]).repeat(20000, 1)
    temperature = torch.full((20000,), 0.8)
    uniform = torch.from_numpy(np.random.default_rng(0).random(20000))
    ids, logprobs = sample_tokens(logits, temperature, uniform, in_cpp=in_cpp)
    expected = torch.softmax(logits[0].double() / 0.8, 0)
    share = torch.bincount(ids, minlength=5).double() / 20000
    assert share[3] == 0
    assert (share - expected).abs().max() < 4 * 0.5 / 20000**0.5
    torch.testing.assert_close(logprobs.double(), expected.log()[ids], atol=1e-6, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_extreme_uniforms_never_pick_a_token_without_mass(uniform: float, in_cpp: bool) -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]])
    at = torch.tensor([uniform], dtype=torch.float64)
    ids, _ = sample_tokens(logits, torch.ones(1), at, in_cpp=in_cpp)
    assert ids.item() in (1, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_an_error(bad: float, in_cpp: bool) -> None:
    logits = torch.full((1, 5), bad)
    with pytest.raises(RolloutError, match="not finite"):
        sample_tokens(logits, torch.ones(1), torch.tensor([0.5]), in_cpp=in_cpp)


def test_a_copy_in_bfloat16_keeps_rotary_angles_in_float32(tiny_model_dir) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    engine = HfRollout(model, BFLOAT16, eos_ids=[], batch_rows=8)
    kept, given = engine.model.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq
    assert torch.equal(kept, given)
    assert all(p.dtype == torch.bfloat16 for p in engine.model.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())
