"""Stop strings end a completion at the same token with hf, with vLLM and by the text alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import RolloutConfig
from aepo_fast.config.toml import load_config
from aepo_fast.rollout.hf import HfRollout
from aepo_fast.rollout.stop_strings import check_stop_strings, watcher
from aepo_fast.samples import Completion, Request
from tests.tiny_architectures import ARCHITECTURES
from tests.tiny_model import build_tiny_tokenizer
from tests.tiny_run import a_machine

TOKENIZER = build_tiny_tokenizer()
PROMPT = tuple(TOKENIZER.encode("What is the product of two numbers?"))
# Across tokens, of one character, of bytes of several tokens, and of a special token's name.
STOP = ("e n", "?!", "é", "<|im_end|>", "7")


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def length_by_text(ids: list[int], stop: tuple[str, ...] = STOP) -> int | None:
    """How many tokens there are up to the first text with a string in it."""
    for length in range(1, len(ids) + 1):
        text = TOKENIZER.decode(ids[:length], skip_special_tokens=False)
        if any(one in text for one in stop):
            return length
    return None


def length_by_us(ids: list[int], stop: tuple[str, ...] = STOP) -> int | None:
    watch = watcher(stop, TOKENIZER)
    assert watch is not None
    ends = watch(PROMPT)
    return next((length for length, token in enumerate(ids, 1) if ends(token)), None)


def random_ids(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, len(TOKENIZER), 60).tolist() for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("the numbers", "the n"),
        ("what?! no", "what?!"),
        ("café et", "café"),
        ("a<|im_end|>b", "a<|im_end|>"),
        ("1 2 7 8", "1 2 7"),
        ("what? !", None),
        ("", None),
    ],
)
def test_a_string_ends_a_completion_at_the_token_that_completes_it(
    text: str, kept: str | None
) -> None:
    ids = ids_of(text)
    length = length_by_us(ids)
    assert length == length_by_text(ids)
    if kept is None:
        assert length is None
    else:
        assert TOKENIZER.decode(ids[:length], skip_special_tokens=False).startswith(kept)


def test_random_tokens_end_where_their_text_says() -> None:
    found = [(length_by_us(ids), length_by_text(ids)) for ids in random_ids(200)]
    assert all(ours == theirs for ours, theirs in found)
    assert 20 < sum(length is not None for length, _ in found)


def test_what_stands_in_the_prompt_does_not_count() -> None:
    watch = watcher(("?A",), TOKENIZER)
    assert watch is not None and not watch(PROMPT)(ids_of("A")[0])
    assert watcher((), TOKENIZER) is None


def a_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def sampled_by_hf(
    folder: Path, requests: list[Request], stop: tuple[str, ...], tokens: int = 40
) -> list[list[Completion]]:
    watch = watcher(stop, AutoTokenizer.from_pretrained(folder))
    engine = HfRollout(a_model(folder), a_machine(), eos_ids=[2], batch_rows=64, watch=watch)
    return engine.generate(requests, max_new_tokens=tokens)


def test_hf_keeps_the_tokens_up_to_the_string_and_their_logprobs(tiny_model_dir: Path) -> None:
    request = [Request(PROMPT, 24, 1.0, 3)]
    (free,), (ended,) = (sampled_by_hf(tiny_model_dir, request, stop) for stop in ((), STOP))
    reasons = set()
    for long, short in zip(free, ended, strict=True):
        length = length_by_text(list(long.completion_ids))
        assert short.completion_ids == long.completion_ids[:length]
        torch.testing.assert_close(
            torch.tensor(short.logprobs), torch.tensor(long.logprobs[:length]), atol=1e-5, rtol=0
        )
        stops = length is not None or long.finish_reason == "stop"
        assert short.finish_reason == ("stop" if stops else "length")
        reasons.add((short.finish_reason, length is not None))
    assert {("stop", True), ("length", False)} <= reasons


def test_a_string_that_the_last_token_completes_is_a_stop(tiny_model_dir: Path) -> None:
    request = [Request(PROMPT, 24, 1.0, 3)]
    ended = sampled_by_hf(tiny_model_dir, request, STOP)[0]
    one = next(x for x in ended if x.finish_reason == "stop" and x.completion_ids[-1] != 2)
    cut = sampled_by_hf(tiny_model_dir, request, STOP, len(one.completion_ids))[0]
    assert cut[ended.index(one)] == one


def test_an_empty_string_and_a_tokenizer_that_hf_cannot_watch_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[model]\npath = "m"\n[[data.sources]]\nname = "products"\n')
    with pytest.raises(ConfigError, match=r"rollout\.stop = \['a', ''\]: an empty string"):
        load_config(str(path), ['rollout.stop=["a", ""]'])
    with pytest.raises(ConfigError, match=r"rollout\.stop = 'a': must be a list"):
        load_config(str(path), ["rollout.stop=a"])
    slow: Any = SimpleNamespace(is_fast=False)
    with pytest.raises(ConfigError, match="hf cannot decode SimpleNamespace token by token"):
        check_stop_strings(RolloutConfig(stop=("a",)), slow)
    check_stop_strings(RolloutConfig("vllm", stop=("a",)), slow)
    check_stop_strings(RolloutConfig(stop=("a",)), TOKENIZER)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_vllm_ends_the_same_completions_at_the_same_tokens(tmp_path: Path) -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    from aepo_fast.rollout.vllm import VllmRollout

    settings = SamplingParams(
        stop=list(STOP), include_stop_str_in_output=True, skip_special_tokens=False
    )
    for ids in random_ids(200):
        request: Any = SimpleNamespace(
            sampling_params=settings,
            request_id="0",
            prompt_token_ids=list(PROMPT),
            prompt_embeds=None,
        )
        theirs = IncrementalDetokenizer.from_new_request(TOKENIZER, request)
        ended = (n for n, token in enumerate(ids, 1) if theirs.update([token], False))
        assert next(ended, None) == length_by_us(ids)

    # An engine with an argument of the user's, which vLLM takes.
    folder = ARCHITECTURES[0].build(tmp_path / "model")
    cfg = RolloutConfig(
        "vllm",
        max_prompt_tokens=100,
        max_new_tokens=40,
        dtype="float32",
        stop=STOP,
        enforce_eager=True,
        engine_kwargs={"max_num_seqs": 7},
    )
    on_gpu = a_machine().vllm_on_gpu
    engine = VllmRollout(str(folder), cfg, eos_ids=[2], seed=0, on_gpu=on_gpu)
    try:
        engine.sync_weights(a_model(folder), 0)
        assert engine.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs == 7
        prompts = [PROMPT[:length] for length in range(2, len(PROMPT) + 1)]
        greedy = [Request(prompt, 1, 0.0, 0) for prompt in prompts]
        ours = sampled_by_hf(folder, greedy, STOP)
        theirs_of_greedy = engine.generate(greedy, max_new_tokens=40)
        for (one,), (other,) in zip(ours, theirs_of_greedy, strict=True):
            assert other.completion_ids == one.completion_ids
            assert other.finish_reason == one.finish_reason
        (drawn,) = engine.generate([Request(PROMPT, 24, 1.0, 3)], max_new_tokens=40)
        assert {one.finish_reason for one in drawn} == {"stop", "length"}
        for one in drawn:
            assert len(one.logprobs) == len(one.completion_ids)
            length = length_by_text(list(one.completion_ids))
            stops = length is not None or one.completion_ids[-1] == 2
            assert length in (None, len(one.completion_ids))
            assert one.finish_reason == ("stop" if stops else "length")
    finally:
        engine.close()
