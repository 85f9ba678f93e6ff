"""Traced activations: linear in the layers, equal to real ones, and equal to an H200's."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PretrainedConfig

from aepo_fast.config.resolve import Machine, resolve_machine
from aepo_fast.config.sections import Config
from aepo_fast.config.toml import load_config
from aepo_fast.memory import model_pass
from aepo_fast.memory.fake_model import PlannedMachine, layer_period, with_layers
from aepo_fast.memory.model_pass import PassBytes, Shape, pass_bytes, samples_of
from aepo_fast.memory.phases import trace, update_bytes
from bench.common.environment import RESULTS
from bench.step.candidates import make_rows
from tests.aepo_fast.memory.models import qwen, small

SHAPE = Shape(prompts=2, group_size=4, prompt_tokens=9, new_tokens=20)
FULL, NONE = "model.gradient_checkpointing=true", "model.gradient_checkpointing=false"


def settled(*overrides: str) -> tuple[Config, Machine]:
    cfg = load_config("first-light", [*overrides, 'trainer.device="cpu"'])
    machine = resolve_machine(cfg)
    return machine.settled(cfg), machine


def traced(config: PretrainedConfig, *overrides: str) -> PassBytes:
    cfg, machine = settled(*overrides)
    return pass_bytes(cfg, machine, config, samples_of(SHAPE))


@pytest.mark.parametrize("checkpointing", [FULL, NONE])
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_few_layers_tell_what_all_of_them_take(checkpointing: str, layout: str) -> None:
    cfg, machine = settled(checkpointing, f'trainer.layout="{layout}"')
    samples, config = samples_of(SHAPE), small()
    few = pass_bytes(cfg, machine, config, samples)  # of two and three layers
    assert few == model_pass._traced(cfg, machine, config, samples)


def test_layers_of_two_kinds_are_taken_by_their_period() -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    config = small(layer_types=kinds)
    cfg, _ = settled()
    assert layer_period(config, cfg) == 2 and layer_period(small(), cfg) == 1
    assert with_layers(config, 4).layer_types == kinds[:4]
    assert config.num_hidden_layers == 6  # is left alone


def test_checkpointing_keeps_less_and_longer_batches_more() -> None:
    full, none = traced(small(), FULL), traced(small(), NONE)
    assert full.kept < none.kept / 2
    wide = traced(small(), NONE, 'trainer.layout="padded"')
    assert wide.kept > none.kept and wide.lines == 8


def test_a_micro_batch_after_another_says_so() -> None:
    assert traced(small(), NONE).again == 0
    assert traced(small(), NONE, "trainer.tokens_per_microbatch=90").again == 1


@pytest.mark.parametrize("attention", ["grouped", "sdpa", "eager"])
def test_real_tensors_take_what_fake_ones_say(attention: str, tmp_path: Any) -> None:
    """The same pass over real weights, C++ operations included, through the same counter."""
    from aepo_fast.memory.live_storages import LiveStorages
    from aepo_fast.model.load import load_model
    from aepo_fast.model.policy import Policy
    from tests.tiny_model import build_tiny_model

    folder = build_tiny_model(tmp_path / "model")
    cfg, machine = settled(NONE, f'model.attention="{attention}"', f'model.path="{folder}"')
    model: LlamaForCausalLM = load_model(cfg.model, folder, machine)  # type: ignore[assignment]
    fake = pass_bytes(cfg, machine, model.config, samples_of(SHAPE))
    policy = Policy(model, machine, cfg.trainer)
    (batch,) = policy.microbatches(samples_of(SHAPE), range(8))
    counter = LiveStorages(64)
    counter.ignore([*model.parameters(), *model.buffers()])
    with counter, policy.same_weights():
        hidden = policy.hidden(batch)
        kept = counter.live
    assert hidden.shape[0] == fake.tokens
    assert abs(kept - fake.kept) <= 0.02 * kept


@pytest.mark.parametrize(("layout", "candidate"), [("padded", "ours, padded"), ("shared", "ours")])
def test_predicts_a_step_of_an_h200(
    layout: str, candidate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = RESULTS / "h200" / "step-20261126-110447.json"
    measured = json.loads(path.read_text())["candidates"][candidate]["peak_extra_bytes"]
    # That commit split micro-batches on a GPU as it does on a CPU, and checkpointed no layers.
    monkeypatch.setattr("aepo_fast.model.policy.GPU_BATCH_TOKENS", 128)
    cfg, _ = settled(NONE, f'trainer.layout="{layout}"', "trainer.tokens_per_microbatch=16384")
    narrow = torch.bfloat16
    machine = PlannedMachine(
        torch.device("cpu"), torch.float32, narrow, narrow, "chunked", for_gpu=True
    )
    rows, advantages = make_rows(12, 8, 100, 256, 151936, 0)
    active = [row for row, one in zip(rows, advantages.tolist(), strict=True) if one]
    found = update_bytes(trace(machine.settled(cfg), machine, qwen(), active), machine)
    assert abs(sum(found.values()) / measured - 1) < 0.005
