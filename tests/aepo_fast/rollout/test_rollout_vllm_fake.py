"""What the vLLM engine does on a GPU and when vLLM fails, with a stand-in of vLLM's interface."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import WeightRenaming

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.method import LossConfig
from aepo_fast.config.sections import LoraConfig, RolloutConfig
from aepo_fast.model.lora import add_adapter
from aepo_fast.rollout.engine import RolloutError
from aepo_fast.rollout.load import check_rollout_backend
from aepo_fast.samples import Request
from aepo_fast.world import ALONE, World
from tests.aepo_fast.rollout import fake_vllm
from tests.tiny_run import tiny_config

REQUESTS = [Request((1, 2), 2, 1.0, 0), Request((3,), 3, 1.3, 1)]


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> fake_vllm.Allocator:
    return fake_vllm.install(monkeypatch)


def build(
    *,
    on_gpu: bool = True,
    lora_rank: int = 0,
    quantization: str = "none",
    world: World = ALONE,
    **settings: Any,
) -> Any:
    from aepo_fast.rollout.vllm import VllmRollout

    cfg = RolloutConfig("vllm", max_prompt_tokens=8, max_new_tokens=4, **settings)
    own = {"on_gpu": on_gpu, "lora_rank": lora_rank, "quantization": quantization, "world": world}
    return VllmRollout("folder", cfg, eos_ids=[2], seed=0, **own)


class Trained(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        values = torch.arange(18, dtype=dtype).view(6, 3)
        self.q, self.k = nn.Parameter(values[:4].clone()), nn.Parameter(values[4:].clone())


def test_the_cache_sleeps_while_training_and_the_weights_stay(
    allocator: fake_vllm.Allocator,
) -> None:
    engine = build(gpu_memory_utilization=0.4)
    assert engine.llm.arguments["enable_sleep_mode"]
    assert engine.llm.arguments["gpu_memory_utilization"] == 0.4
    assert not engine.llm.arguments["enforce_eager"]
    engine.generate(REQUESTS, max_new_tokens=4)
    engine.sleep()
    engine.sleep()
    assert allocator.events == [("discard", "kv_cache")]
    assert engine.metrics["memory/rollout_awake_gib"] == 16
    assert engine.metrics["memory/rollout_asleep_gib"] == 8
    assert "reset" in engine.llm.events  # what was cached is gone
    engine.sync_weights(Trained(torch.bfloat16), 1)  # does not need the cache
    assert len(allocator.events) == 1
    engine.generate(REQUESTS, max_new_tokens=4)
    assert allocator.events[1:] == [("wake", ["kv_cache"])]


@pytest.mark.parametrize("settings", [{"sleep": "none"}, {"steps_ahead": 1}])
def test_it_stays_awake_where_asked_or_while_it_samples_ahead(
    allocator: fake_vllm.Allocator, settings: dict[str, Any]
) -> None:
    engine = build(**settings)
    engine.sleep()
    assert not engine.llm.arguments["enable_sleep_mode"] and allocator.events == []


def test_all_of_it_sleeps_and_the_next_sync_writes_all_weights(
    allocator: fake_vllm.Allocator,
) -> None:
    engine, model = build(sleep="all", share_weights=False), Trained(torch.float32)
    engine.sync_weights(model, 0)
    engine.generate(REQUESTS, max_new_tokens=4)
    engine.sleep()
    engine.sleep()
    assert allocator.events == [("sleep", 2)]
    assert engine.metrics["memory/rollout_awake_gib"] == 16
    assert engine.metrics["memory/rollout_asleep_gib"] == 5
    with pytest.raises(RolloutError, match="has given its weights back, and got none since"):
        engine.generate(REQUESTS, max_new_tokens=4)
    with torch.no_grad():
        model.q += 100
    engine.sync_weights(model, 1)
    assert allocator.events[1:] == [("wake", ["weights"])]  # the cache sleeps on
    written = torch.cat([model.q, model.k])
    assert torch.equal(engine.llm.model.qk.float(), written)
    engine.generate(REQUESTS, max_new_tokens=4)
    assert allocator.events[2:] == [("wake", ["kv_cache"])]


def test_weights_that_something_else_needs_do_not_sleep(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.sleep = 'all': .*rollout\.share_weights"):
        RolloutConfig("vllm", sleep="all")
    cfg = tiny_config(tmp_path, tmp_path)
    rollout = RolloutConfig("vllm", sleep="all", share_weights=False)
    replace(cfg, rollout=rollout, loss=LossConfig())
    with pytest.raises(ConfigError, match=r"rollout\.sleep = 'all': with model\.lora"):
        model = replace(cfg.model, lora=LoraConfig(rank=4))
        replace(cfg, rollout=rollout, model=model, loss=LossConfig())


def test_on_a_cpu_it_never_sleeps_and_has_small_blocks(allocator: fake_vllm.Allocator) -> None:
    engine = build(on_gpu=False)
    engine.sleep()
    assert not engine.llm.arguments["enable_sleep_mode"] and allocator.events == []
    assert engine.llm.arguments["block_size"] == 32
    assert "block_size" not in build().llm.arguments


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_tied_head_is_packed_anew_on_a_cpu(
    allocator: fake_vllm.Allocator, monkeypatch: pytest.MonkeyPatch, on_gpu: bool
) -> None:
    engine, packed = build(on_gpu=on_gpu), []
    module = sys.modules["aepo_fast.rollout.vllm_weights"]
    for name in ("initialize_layerwise_reload", "finalize_layerwise_reload"):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(
        module, "dispatch_cpu_unquantized_gemm", lambda head, **_: packed.append(head)
    )
    model = engine.llm.model
    model.packed = nn.Parameter(torch.zeros(0))  # as the CPU build leaves what it has packed
    model.lm_head = nn.Linear(1, 1)
    engine.llm.transfer.model_config.hf_config.tie_word_embeddings = True
    engine.sync_weights(Trained(torch.bfloat16), 1)
    assert packed == ([] if on_gpu else [model.lm_head])


def test_weights_are_shared_and_a_sync_copies_nothing(allocator: fake_vllm.Allocator) -> None:
    engine, model = build(), Trained(torch.bfloat16)
    engine.sync_weights(model, 1)
    assert engine.metrics["sync/bytes_copied"] == 0 and engine.weights_version == 1
    with torch.no_grad():
        model.k += 100
    assert torch.equal(engine.llm.model.qk[4:], model.k)
    assert engine.llm.events == ["reset"]


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"share_weights": False}),
        (torch.bfloat16, {"steps_ahead": 1}),
    ],
)
def test_weights_that_cannot_or_must_not_be_shared_are_copied(
    allocator: fake_vllm.Allocator, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    engine, model = build(**settings), Trained(dtype)
    engine.sync_weights(model, 0)
    with torch.no_grad():
        model.q += 100
    assert not torch.equal(engine.llm.model.qk[:4].to(dtype), model.q)
    engine.sync_weights(model, 1)
    assert torch.equal(engine.llm.model.qk[:4].to(dtype), model.q)
    assert engine.metrics["sync/bytes_copied"] == 18 * 2


def test_samples_come_back_in_the_order_asked_for(allocator: fake_vllm.Allocator) -> None:
    engine, seen, counted = build(), [], []
    groups = engine.generate(
        REQUESTS,
        max_new_tokens=4,
        on_tokens=counted.append,
        on_group=lambda index, group: seen.append((index, len(group))),
    )
    assert seen == [(1, 3), (0, 2)] and counted == [12, 8]
    assert [[one.prompt_ids for one in group] for group in groups] == [[(1, 2)] * 2, [(3,)] * 3]
    assert {one.temperature for one in groups[1]} == {1.3}


@pytest.mark.parametrize("error", [RuntimeError("no cache blocks"), ValueError("no cache blocks")])
def test_an_engine_that_does_not_start(
    allocator: fake_vllm.Allocator, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(fake_vllm.LLM, "failure", error)
    with pytest.raises(
        ConfigError, match="rollout.backend = 'vllm'.*no cache blocks.*gpu_memory_utilization"
    ):
        build()


def test_4_bit_weights_are_rounded_by_vllm_itself(
    allocator: fake_vllm.Allocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, plain = build(lora_rank=4, quantization="nf4"), build(lora_rank=4)
    added = engine.llm.arguments.keys() - plain.llm.arguments.keys()
    assert {engine.llm.arguments[name] for name in added} == {"bitsandbytes"}
    assert added == {"quantization", "load_format"}
    error = AttributeError("'WeightsMapper' has no attribute")
    monkeypatch.setattr(fake_vllm.LLM, "failure", error)
    with pytest.raises(ConfigError, match="WeightsMapper.*vllm-bnb-plugin that goes with"):
        build(lora_rank=4, quantization="nf4")
    with pytest.raises(ConfigError, match="vLLM 0.29.0 cannot run this model: 'WeightsMapper'"):
        build(lora_rank=4)


@pytest.mark.parametrize(
    ("version", "plugged", "refused"),
    [("0.26.0", False, False), ("0.28.0", True, False), ("0.28.0", False, True)],
)
def test_4_bit_weights_need_a_plugin_of_newer_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, plugged: bool, refused: bool
) -> None:
    there = {"vllm"} | ({"vllm_bnb_plugin"} if plugged else set())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in there or None)
    monkeypatch.setattr("aepo_fast.rollout.load.vllm_version", lambda: version)
    cfg = tiny_config(tmp_path, tmp_path)
    cfg = replace(cfg, rollout=RolloutConfig("vllm"))
    check_rollout_backend(cfg)
    in_4_bits = replace(cfg.model, quantization="nf4", lora=LoraConfig(rank=4))
    cfg = replace(cfg, model=in_4_bits)
    if not refused:
        check_rollout_backend(cfg)
        return
    with pytest.raises(ConfigError, match="0.28.0 takes 4-bit weights with vllm-bnb-plugin"):
        check_rollout_backend(cfg)


def test_an_engine_that_dies_while_sampling(allocator: fake_vllm.Allocator) -> None:
    engine = build()
    engine.llm.llm_engine.failure = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RolloutError, match="OutOfMemoryError: CUDA out of memory.*lower rollout"):
        engine.generate(REQUESTS, max_new_tokens=4)
    assert engine.llm.events == ["abort"]
    engine.llm.llm_engine.failure = None
    assert len(engine.generate(REQUESTS, max_new_tokens=4)) == 2


def test_requests_that_are_aborted_or_lost(
    allocator: fake_vllm.Allocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build()
    engine.llm.llm_engine.finish_reason = "abort"
    with pytest.raises(RolloutError, match="ended a request with 'abort'"):
        engine.generate(REQUESTS, max_new_tokens=4)
    monkeypatch.setattr(engine.llm.llm_engine, "add_request", lambda *_, **__: None)
    with pytest.raises(RolloutError, match="answered 0 of 2"):
        engine.generate(REQUESTS, max_new_tokens=4)


def test_a_prompt_beyond_the_models_length(allocator: fake_vllm.Allocator) -> None:
    with pytest.raises(RolloutError, match="prompt of 9 tokens and 4 new ones.*limit of 12"):
        build().generate([Request((1,) * 9, 1, 1.0, 0)], max_new_tokens=4)


def test_a_prefix_cache_that_stays_is_an_error(allocator: fake_vllm.Allocator) -> None:
    engine = build()
    engine.llm.cache_resets = False
    with pytest.raises(RolloutError, match="kept its prefix cache"):
        engine.sync_weights(Trained(torch.bfloat16), 1)


def test_of_an_adapter_a_sync_hands_over_that_alone(
    allocator: fake_vllm.Allocator, tiny_model_dir: Path
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    add_adapter(model, LoraConfig(rank=5), seed=0)
    engine = build(lora_rank=5)
    names = "enable_lora", "max_lora_rank", "max_loras"
    assert [engine.llm.arguments[name] for name in names] == [True, 8, 1]
    engine.generate(REQUESTS[:1], max_new_tokens=4)  # before any sync as the model is
    assert engine.llm.events == ["step"]

    engine.sync_weights(model, 3)
    update, reset = engine.llm.events[1:]
    assert update.load_inplace and reset == "reset" and engine.weights_version == 3
    trained = [one for one in model.parameters() if one.requires_grad]
    assert len(engine.llm.llm_engine.adapter) == len(trained)
    assert not Path(update.lora_path).exists()  # a kill would leave it in memory
    assert engine.metrics["sync/bytes_copied"] < 2 * sum(one.nbytes for one in trained)
    engine.generate(REQUESTS[:1], max_new_tokens=4)
    sampled = engine.llm.events[3]
    assert (sampled.lora_path, sampled.load_inplace) == (update.lora_path, False)

    engine.llm.llm_engine.takes_lora = False
    with pytest.raises(RolloutError, match="vLLM did not take the adapter in"):
        engine.sync_weights(model, 4)
    assert engine.weights_version == 3
    assert not Path(engine.llm.events[-1].lora_path).exists()


def test_an_adapter_of_more_than_vllm_takes(allocator: fake_vllm.Allocator) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.rank = 33: is more than vLLM takes.*32"):
        build(lora_rank=33)


def test_what_a_checkpoint_names_otherwise_is_loaded_anew_at_each_sync(
    allocator: fake_vllm.Allocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(on_gpu=False)
    from aepo_fast.rollout import vllm_weights

    kernels: list[Any] = []
    for name in ("initialize_layerwise_reload", "finalize_layerwise_reload"):
        monkeypatch.setattr(vllm_weights, name, lambda model, *_: kernels.append(method.moe_kernel))
    method = engine.llm.model.quant_method = SimpleNamespace(moe_kernel="of packed experts")
    model: Any = Trained(torch.float32)
    model.of_q = model._parameters.pop("q")
    model.config, model._weight_conversions = None, [WeightRenaming("^q", "of_q")]
    for version in (1, 2):
        with torch.no_grad():
            model.of_q += 8
        engine.sync_weights(model, version)
        assert torch.equal(engine.llm.model.qk.float(), torch.cat([model.of_q, model.k]))
        assert engine.metrics["sync/bytes_copied"] == 36
    # vLLM packs experts anew only where it makes their kernel anew.
    assert kernels == [None] * 4


def test_a_model_that_vllm_runs_by_code_of_transformers_is_refused(
    allocator: fake_vllm.Allocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_vllm.LLM, "of_transformers", True)
    with pytest.raises(ConfigError, match="takes transformers' code for this model"):
        build()


@pytest.mark.parametrize("on_gpu", [True, False])
def test_over_ranks_a_request_has_its_seed_and_weights_come_one_by_one(
    allocator: fake_vllm.Allocator, monkeypatch: pytest.MonkeyPatch, on_gpu: bool
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    engine = build(on_gpu=on_gpu, world=World(rank=5, size=8, local_rank=1))
    assert os.environ["LOCAL_RANK"] == "1"
    assert engine.llm.arguments["distributed_executor_backend"] == "external_launcher"
    assert engine.llm.arguments["tensor_parallel_size"] == engine.ranks == 1
    assert engine.llm.arguments.get("enable_chunked_prefill", True) == on_gpu
    for part in (REQUESTS, REQUESTS[1:], REQUESTS[:1]):
        engine.generate(part, max_new_tokens=4)
    other, one, *again = engine.llm.llm_engine.seeds
    assert one != other and again == [other, one]
    assert all(0 <= seed < 2**62 for seed in (one, other))

    from aepo_fast.rollout import vllm, vllm_weights

    for name in ("initialize_layerwise_reload", "finalize_layerwise_reload"):
        monkeypatch.setattr(vllm_weights, name, lambda *_: None)
    gathered: list[str] = []

    def weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        assert dtype == torch.bfloat16
        for name, one in model.named_parameters():
            gathered.append(name)
            yield name, one.detach().to(dtype)

    monkeypatch.setattr(vllm, "whole_weights", weights)
    model = Trained(torch.float32)
    for version in (1, 2):
        with torch.no_grad():
            model.q += 8
        engine.sync_weights(model, version)
        assert torch.equal(engine.llm.model.qk.float(), torch.cat([model.q, model.k]))
        assert engine.metrics["sync/bytes_copied"] == 36
    assert gathered == ["q", "k"] * 2


def test_in_one_process_a_request_has_no_seed_and_an_engine_its_own_gpu(
    allocator: fake_vllm.Allocator,
) -> None:
    engine = build(tensor_parallel=2)  # as of a run that `aepo-fast eval` evaluates
    assert "distributed_executor_backend" not in engine.llm.arguments and engine.ranks == 1
    engine.generate(REQUESTS, max_new_tokens=4)
    assert engine.llm.llm_engine.seeds == [None, None]
