"""`rollout.engine_kwargs` reaches vLLM, and what it may not hold is refused before weights load."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import RolloutConfig
from aepo_fast.rollout.engine_kwargs import _FIXED, _OURS, check_engine_kwargs
from aepo_fast.rollout.load import check_rollout_backend
from aepo_fast.training.run import train
from tests.aepo_fast.rollout import fake_vllm
from tests.tiny_run import tiny_config


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)
    monkeypatch.setattr("aepo_fast.rollout.load.vllm_version", lambda: "0.29.0")


def build(*, on_gpu: bool = True, **settings: Any) -> Any:
    from aepo_fast.rollout.vllm import VllmRollout

    cfg = RolloutConfig("vllm", max_prompt_tokens=8, max_new_tokens=4, **settings)
    own: Any = {"lora_rank": 4, "quantization": "nf4"}
    return VllmRollout("folder", cfg, eos_ids=[2], seed=0, on_gpu=on_gpu, **own)


@pytest.mark.usefixtures("fake")
def test_arguments_reach_vllm_and_go_before_ours_where_they_may() -> None:
    given = {"max_num_seqs": 64, "speculative_config": {"method": "ngram"}, "block_size": 128}
    arguments = build(engine_kwargs=given, on_gpu=False).llm.arguments
    assert given.items() <= arguments.items()
    assert build(on_gpu=False).llm.arguments["block_size"] == 32


@pytest.mark.usefixtures("fake")
def test_all_that_the_engine_is_given_is_refused_among_them() -> None:
    assert set(build(on_gpu=True).llm.arguments) <= set(_OURS) | set(_FIXED)


GOOD = [
    {"max_num_seqs": 64, "enable_prefix_caching": False},
    {"kv_cache_dtype": "fp8"},
    {"attention_backend": "FLASH_ATTN"},  # vLLM reads names of its enumerations on its own
    {"lora_dtype": "bfloat16"},
    {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
]
BAD = [
    ("max_num_seq", 64, r"is no argument of the installed vLLM\. Did you mean .*max_num_seqs"),
    ("enforce_eage", True, r"is no argument"),
    ("zzzz", 1, r"is no argument of the installed vLLM\. See vllm serve --help"),
    ("max_num_seqs", "many", r"vLLM does not take it: Input should be a valid integer"),
    ("kv_cache_dtype", "fp9", r"vLLM does not take it: Input should be 'auto'"),
    ("enforce_eager", True, r"is set by rollout\.enforce_eager\. Leave it out, and set rollout\."),
    ("max_model_len", 9, r"set by rollout\.max_prompt_tokens and rollout\.max_new_tokens"),
    ("seed", 3, r"is set by trainer\.seed"),
    ("quantization", "fp8", r"is set by model\.quantization"),
    ("logprobs_mode", "raw_logprobs", r"the loss needs log-probs after temperature\. Leave it out"),
    ("logits_processors", ["a"], r"the loss takes the same distribution"),
    ("tensor_parallel_size", 2, r"is set by rollout.tensor_parallel"),
]


def check_all() -> None:
    for given in GOOD:
        check_engine_kwargs(given)
    for name, value, message in BAD:
        with pytest.raises(ConfigError, match=rf"rollout\.engine_kwargs\.{name} = .*{message}"):
            check_engine_kwargs({name: value})


@pytest.mark.usefixtures("fake")
def test_arguments_are_judged_by_name_and_by_vllms_own_types() -> None:
    check_all()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_the_installed_vllm_takes_and_refuses_the_same() -> None:
    check_all()
    check_engine_kwargs({"compilation_config": {"cudagraph_mode": "PIECEWISE"}})
    with pytest.raises(ConfigError, match="compilation_config.*Unexpected keyword argument"):
        check_engine_kwargs({"compilation_config": {"cudagraphs": True}})


@pytest.mark.usefixtures("fake")
def test_a_run_refuses_them_before_it_looks_for_the_model(tmp_path: Path) -> None:
    rollout = RolloutConfig("vllm", engine_kwargs={"max_num_seq": 64})
    cfg = tiny_config(tmp_path / "no model", tmp_path / "run", rollout=rollout)
    with pytest.raises(ConfigError, match=r"rollout\.engine_kwargs\.max_num_seq = 64"):
        train(cfg)
    assert not (tmp_path / "run").exists()
    good = replace(rollout, engine_kwargs={"max_num_seqs": 64})
    check_rollout_backend(replace(cfg, rollout=good))


@pytest.mark.usefixtures("fake")
def test_what_vllm_refuses_at_its_start_may_be_of_the_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fake_vllm.LLM, "failure", ValueError("no blocks"))
    with pytest.raises(ConfigError, match="did not start: no blocks.*or leave out what of rollout"):
        build(engine_kwargs={"max_num_seqs": 64})
    with pytest.raises(ConfigError, match="no blocks") as caught:
        build()
    assert "engine_kwargs" not in str(caught.value)
