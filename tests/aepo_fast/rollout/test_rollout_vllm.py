"""The vLLM rollout engine with real weights, where vLLM is installed."""

from __future__ import annotations

import importlib.util
import resource
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from aepo_fast.config.sections import RolloutConfig, TrainerConfig
from aepo_fast.model.kept import keep_most_likely, room
from aepo_fast.model.load import resolve
from aepo_fast.model.policy import Policy
from aepo_fast.rollout.canary import Canary, StaleWeightsError
from aepo_fast.rollout.engine import RolloutError
from aepo_fast.rollout.hf import HfRollout
from aepo_fast.samples import Completion, Request, Sample
from aepo_kernels import multiplies_bfloat16
from tests.tiny_run import a_machine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]
# SmolLM2 has a tied head, which is where packed weights go stale.
MODEL = "package:smollm2-135m-instruct"
FAST = multiplies_bfloat16("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = "bfloat16" if FAST else "float32"


@pytest.fixture(scope="module")
def folder() -> str:
    return str(resolve(MODEL))


@pytest.fixture(scope="module")
def engine(folder: str) -> Iterator[Any]:
    from aepo_fast.rollout.vllm import VllmRollout

    lengths = {"max_prompt_tokens": 300, "max_new_tokens": 32}
    cfg = RolloutConfig("vllm", **lengths, dtype=DTYPE, enforce_eager=True, top_k=20)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, on_gpu = [tokenizer.eos_token_id], a_machine().vllm_on_gpu
    made = VllmRollout(folder, cfg, eos_ids=ids, seed=0, on_gpu=on_gpu)
    yield made
    made.close()


@pytest.fixture
def model(folder: str, engine: Any) -> Iterator[PreTrainedModel]:
    """The trainer's model, as it is on disk; the engine gets these weights back afterwards."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine.sync_weights(model, 0)
    yield model
    model.load_state_dict(before)
    engine.sync_weights(model, 0)


@pytest.fixture
def policy(model: PreTrainedModel) -> Policy:
    return Policy(model, a_machine(compute=getattr(torch, DTYPE)), TrainerConfig())


@pytest.fixture(scope="module")
def prompts(folder: str) -> list[tuple[int, ...]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = [f"What is {n} times {n + 2}? Answer with the number only." for n in range(2, 6)]
    questions.append("Count to a hundred. " * 40)  # longer than a block of the prefix cache
    return [
        tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True
            )["input_ids"]
        )
        for question in questions
    ]


def nudge(model: PreTrainedModel, size: float = 0.03) -> None:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * parameter.abs().mean() * torch.randn(parameter.shape, generator=rng)


def test_samples_at_mixed_temperatures_carry_the_law_they_were_drawn_from(
    engine: Any, policy: Policy, prompts: list[tuple[int, ...]]
) -> None:
    temperatures = (1.0, 1.0, 0.7, 1.3)
    requests = [
        Request(prompt, 3, temperature, seed)
        for seed, (prompt, temperature) in enumerate(zip(prompts, temperatures, strict=False))
    ]
    counted: list[int] = []
    groups = engine.generate(requests, max_new_tokens=12, on_tokens=counted.append)
    assert [len(group) for group in groups] == [3, 3, 3, 3]
    differences = []
    for request, group in zip(requests, groups, strict=True):
        assert len({one.completion_ids for one in group}) > 1
        samples = [Sample(one, 0, False, None) for one in group]
        values = policy.token_values(samples, range(3), second_temperature=request.temperature)
        assert values.second_logprob is not None
        sampled = torch.tensor([x for one in group for x in one.logprobs])
        differences.append((values.second_logprob - sampled).abs())
        for one in group:
            assert one.prompt_ids == request.prompt_ids and one.weights_version == 0
            stopped = one.completion_ids[-1] in engine.eos_ids
            assert one.finish_reason == ("stop" if stopped else "length")
            assert len(one.logprobs) == len(one.completion_ids) <= 12
    assert torch.cat(differences).mean() < 0.06
    assert sum(counted) == sum(len(one.completion_ids) for group in groups for one in group)


def test_temperature_zero_and_a_tiny_top_p_take_the_most_likely_tokens(
    engine: Any, policy: Policy, prompts: list[tuple[int, ...]]
) -> None:
    requests = [Request(prompts[0], 1, 0.0, 1), Request(prompts[0], 2, 1.0, 2, top_p=1e-6)]
    (greedy,), nearly = engine.generate(requests, max_new_tokens=10)
    assert {one.completion_ids for one in nearly} == {greedy.completion_ids}
    assert max(abs(value) for one in nearly for value in one.logprobs) < 1e-4
    values = policy.token_values([Sample(greedy, 0, False, None)], [0], second_temperature=1.0)
    assert values.second_logprob is not None
    assert (values.second_logprob - torch.tensor(greedy.logprobs)).abs().mean() < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_is_what_vllm_keeps(dtype: torch.dtype) -> None:
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    # bfloat16 logits have many ties.
    logits = (torch.randn(64, 400, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    heat, top_k = torch.tensor([0.7, 1.0, 1.3, 1.6]).repeat(16), torch.tensor(20)
    for top_p in (None, 0.95, 0.5, 1e-6):
        shares = None if top_p is None else torch.full((64,), top_p)
        given = logits.float() / heat[:, None]
        processed = apply_top_k_top_p_pytorch(
            given.clone(), top_k.int().expand(64), shares, allow_cpu_sync=True
        )
        tempered, ids = keep_most_likely(logits, heat, top_k.expand(64), shares)
        for row, kept, values in zip(processed, ids, tempered, strict=True):
            theirs = row[row > -torch.inf].sort().values
            assert torch.equal(values[values > -torch.inf].sort().values, theirs)
            if top_p is None:  # else either of two equal ones may be left out
                assert set(kept[kept >= 0].tolist()) == set(row.isfinite().nonzero()[:, 0].tolist())


def test_what_was_kept_comes_with_samples_and_is_replayed(
    engine: Any, model: PreTrainedModel, policy: Policy, prompts: list[tuple[int, ...]]
) -> None:
    kept: dict[str, Any] = {"top_k": 20, "top_p": 0.9, "with_kept": True}
    requests = [
        Request(prompt, 6, temperature, seed, **kept)
        for seed, (prompt, temperature) in enumerate(zip(prompts, (1.0, 1.0, 1.3), strict=False))
    ]
    groups = engine.generate(requests, max_new_tokens=12)
    hf = HfRollout(model, a_machine(compute=getattr(torch, DTYPE)), eos_ids=(), batch_rows=32)
    differences, whole, sizes = [], [], []
    for request, group, other in zip(
        requests, groups, hf.generate(requests, max_new_tokens=1), strict=True
    ):
        values, of_all = (
            policy.token_values(
                [Sample(one, 0, False, None) for one in some],
                range(6),
                second_temperature=request.temperature,
            )
            for some in (group, [replace(one, kept_ids=None) for one in group])
        )
        sampled = torch.tensor([x for one in group for x in one.logprobs])
        assert values.second_logprob is not None and of_all.second_logprob is not None
        differences.append((values.second_logprob - sampled).abs())
        whole.append((of_all.second_logprob - sampled).abs())
        for one in group:
            assert len(one.kept_ids) == len(one.completion_ids) == len(one.logprobs)
            for token, ids in zip(one.completion_ids, one.kept_ids.tolist(), strict=True):
                found = [x for x in ids if x >= 0]
                assert token in found and len(set(found)) == len(found) <= room(20)
                sizes.append(len(found))
        # Of the first token both engines keep the same, but for rounding at the last one.
        ours, theirs = ({*ids.kept_ids[0].tolist()} - {-1} for ids in (other[0], group[0]))
        assert len(ours ^ theirs) <= max(2, len(ours) // 4)
    assert torch.cat(differences).mean() < 0.06  # as for samples from all tokens
    assert torch.cat(whole).mean() > 0.1
    assert len(set(sizes)) > 5


def test_the_canary_sees_what_is_not_replayed(
    engine: Any,
    policy: Policy,
    prompts: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aepo_fast.rollout.canary._DRAWS", 1)
    kept = {"top_k": 20, "top_p": 0.8, "with_kept": True}
    usual = Canary(engine, policy, prompts[:4]).fresh
    replayed = Canary(engine, policy, prompts[:4], kept=kept).fresh
    monkeypatch.setattr("aepo_fast.model.batch.kept_ids", lambda samples, indices: None)
    lost = Canary(engine, policy, prompts[:4], kept=kept).fresh
    assert replayed < 1.5 * max(usual, 0.02) and lost > 0.1 and lost > 4 * replayed


def test_a_seed_gives_the_same_samples_again(engine: Any, prompts: list[tuple[int, ...]]) -> None:
    requests = [Request(prompts[0], 4, 1.0, 7)]
    first, second = (engine.generate(requests, max_new_tokens=10) for _ in range(2))
    assert [one.completion_ids for one in first[0]] == [one.completion_ids for one in second[0]]


def test_after_a_sync_the_engines_agree_as_before_and_without_it_they_do_not(
    engine: Any, model: PreTrainedModel, policy: Policy, prompts: list[tuple[int, ...]]
) -> None:
    canary = Canary(engine, policy, prompts)
    assert canary.fresh < 0.06
    nudge(model)
    with pytest.raises(StaleWeightsError):
        canary.check()
    engine.sync_weights(model, 1)
    assert canary.check() <= canary.limit
    assert engine.weights_version == 1


def test_a_head_that_stayed_stale_is_caught(
    engine: Any,
    model: PreTrainedModel,
    policy: Policy,
    prompts: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.is_available():
        pytest.skip("only the CPU build packs weights")
    from aepo_fast.rollout import vllm_weights

    canary = Canary(engine, policy, prompts)
    monkeypatch.setattr(vllm_weights, "dispatch_cpu_unquantized_gemm", lambda *_, **__: None)
    nudge(model)
    engine.sync_weights(model, 1)
    with pytest.raises(StaleWeightsError):
        canary.check()


def test_a_stale_prefix_cache_is_caught(
    engine: Any,
    model: PreTrainedModel,
    policy: Policy,
    prompts: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    canary = Canary(engine, policy, prompts[-1:])  # the long prompt, which is cached
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: True)
    nudge(model, 0.1)
    engine.sync_weights(model, 1)
    with pytest.raises(StaleWeightsError):
        canary.check()
    monkeypatch.undo()
    engine.sync_weights(model, 2)
    assert canary.check() <= canary.limit


def test_groups_come_one_by_one_and_can_stop_the_sampling(
    engine: Any, prompts: list[tuple[int, ...]]
) -> None:
    requests = [Request(prompt, 2, 1.0, seed) for seed, prompt in enumerate(prompts)]
    seen: dict[int, list[Completion]] = {}
    groups = engine.generate(requests, max_new_tokens=6, on_group=seen.__setitem__)
    assert [seen[index] for index in range(len(requests))] == groups
    calls = []

    def stop(tokens: int) -> None:
        calls.append(tokens)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests, max_new_tokens=32, on_tokens=stop)
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert engine.generate(requests, max_new_tokens=6) == groups


def test_no_requests_and_prompts_that_are_too_long(engine: Any) -> None:
    assert engine.generate([], max_new_tokens=4) == []
    long = Request(tuple(range(10, 320)), 1, 1.0, 0)
    with pytest.raises(RolloutError, match="prompt of 310 tokens and 32 new ones do not fit.*332"):
        engine.generate([long], max_new_tokens=32)
    assert not engine.llm.llm_engine.has_unfinished_requests()


def test_an_aborted_request_is_an_error(
    engine: Any, prompts: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = engine.llm.llm_engine
    plain = inner.step

    def step() -> list[Any]:
        outputs = plain()
        for output in outputs:
            for sample in output.outputs:
                sample.finish_reason = "abort"
        return outputs

    monkeypatch.setattr(inner, "step", step)
    with pytest.raises(RolloutError, match="ended a request with 'abort'.*cpu_kv_cache_gib"):
        engine.generate([Request(prompts[0], 2, 1.0, 0)], max_new_tokens=4)


def test_fifty_updates_leak_no_memory(engine: Any, model: PreTrainedModel) -> None:
    for version in range(10):
        engine.sync_weights(model, version)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for version in range(50):
        engine.sync_weights(model, version)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert grown < 0.1, f"{grown:.2f} GiB"
