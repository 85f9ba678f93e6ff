"""The plan as a whole: phases, what fits, the changes that help, and the refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3MoeConfig

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import resolve_machine
from aepo_fast.config.sections import Config, ModelConfig
from aepo_fast.config.toml import load_config
from aepo_fast.memory import check
from aepo_fast.memory.check import predict
from aepo_fast.memory.devices import named_device, this_device
from aepo_fast.memory.fit import cheapest_changes, largest, planner
from aepo_fast.memory.model_pass import UntraceableError
from aepo_fast.memory.plan import Device, MemoryPlan, shape_of
from aepo_fast.training.run import train
from tests.aepo_fast.memory.models import qwen, small
from tests.tiny_model import build_tiny_model
from tests.tiny_run import tiny_config

COMPLETIONS = "rollout.max_new_tokens=1024", "trainer.group_size=8"
FULL_ON_16 = (
    *COMPLETIONS,
    'model.dtype="bfloat16"',
    'model.gradient_checkpointing="full"',
    'trainer.optimizer="adamw_8bit"',
    "rollout.batch_rows=64",
)
LORA_ON_8 = (
    *COMPLETIONS,
    'model.dtype="bfloat16"',
    'model.gradient_checkpointing="full"',
    "model.lora.rank=16",
    "rollout.batch_rows=32",
)


def plan_of(config: Any, gpu: str, *overrides: str) -> MemoryPlan:
    cfg = load_config("first-light", overrides)
    plan = planner(config, named_device(gpu), prompt_tokens=512, for_gpu=True)
    return plan(cfg)


def test_full_training_of_1_5b_fits_16_gib_and_float32_does_not() -> None:
    assert plan_of(qwen(), "16GiB", *FULL_ON_16).fits
    plain = plan_of(qwen(), "24GiB", *COMPLETIONS)
    assert not plain.fits and plain.worst.name == "update"
    # Weights, gradients and two moments in float32, of 1.54 billion weights.
    assert plain.num_weights == 1543714304
    assert plain.worst.parts["weights"] == pytest.approx(4 * plain.num_weights, rel=1e-6)
    assert plain.worst.parts["gradients"] == 4 * plain.num_weights
    assert plain.worst.parts["optimizer"] == 8 * plain.num_weights


def test_an_adapter_on_1_5b_fits_8_gib() -> None:
    pytest.importorskip("peft")
    assert plan_of(qwen(), "8GiB", *LORA_ON_8).fits
    assert plan_of(qwen(), "6GiB", *LORA_ON_8, 'model.quantization="nf4"').fits


def test_what_lies_in_cpu_memory_takes_nothing_of_the_gpu() -> None:
    few, gpu = qwen(num_hidden_layers=2), "24GiB"
    common = (*COMPLETIONS, 'trainer.device="cuda"', "rollout.batch_rows=64")
    plain = plan_of(few, gpu, *common)
    state, everything = (
        plan_of(few, gpu, *common, f'trainer.offload="{which}"') for which in ("optimizer", "all")
    )
    parts = {phase.name: phase.parts for phase in state.phases}
    assert "optimizer" not in parts["update"] and parts["step"]["activations"] > 2**28
    assert state.peak < plain.peak - 4 * plain.num_weights
    # Of the weights, embedding and two layers are there, in bfloat16.
    worst = {phase.name: phase.parts for phase in everything.phases}["update"]
    assert worst["weights"] == 2 * plain.num_weights
    assert everything.peak < state.peak
    asleep = plan_of(
        few, gpu, *common[:-1], 'rollout.backend="vllm"', "rollout.offload_optimizer=true"
    )
    assert "optimizer" not in {phase.name: phase.parts for phase in asleep.phases}["sample"]


def test_activations_in_cpu_memory_are_not_counted() -> None:
    few = qwen(num_hidden_layers=4)
    common = (*COMPLETIONS, 'trainer.device="cuda"', 'model.gradient_checkpointing="none"')
    kept, moved = (
        plan_of(few, "24GiB", *common, f"model.activation_offloading={on}").activations.kept
        for on in ("false", "true")
    )
    assert moved < 0.5 * kept


def test_a_model_whose_pass_depends_on_numbers_is_not_planned(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=300,
    )
    with pytest.raises(UntraceableError, match="qwen3_moe cannot be traced") as caught:
        plan_of(experts, "24GiB")
    assert caught.value.key == "model.path"
    monkeypatch.setattr(check, "read_config", lambda folder, **trust: experts)
    monkeypatch.setattr(check, "_SMALL", 0.0)
    machine = resolve_machine(run)
    found = predict(machine.settled(run), machine, tmp_path, prompt_tokens=8, given=run)
    assert found.peak is None
    assert "memory is not predicted: a pass of qwen3_moe" in capsys.readouterr().err


def test_holes_and_the_context_are_needed_beside_tensors() -> None:
    found = plan_of(small(num_hidden_layers=1), "1GiB")
    assert found.needed > found.peak + found.device.process - 1


def test_vllm_takes_its_share_while_it_samples() -> None:
    cfg = load_config("first-light", ['rollout.backend="vllm"', *FULL_ON_16[:-1]])
    few = qwen(num_hidden_layers=2)
    plan = planner(few, named_device("24GiB"), prompt_tokens=512, for_gpu=True)(cfg)
    phases = {phase.name: phase.parts for phase in plan.phases}
    share = round(0.3 * 24 * 2**30)
    assert phases["sample"]["weights"] + phases["sample"]["cache"] == pytest.approx(share, rel=1e-6)
    assert "cache" not in phases["update"] and "sampler" not in phases["update"]


def test_changes_fit_and_the_first_costs_the_least() -> None:
    cfg = load_config("first-light", COMPLETIONS)
    one_layer = qwen(num_hidden_layers=1)
    plan = planner(one_layer, named_device("7GiB"), prompt_tokens=256, for_gpu=True)
    assert not plan(cfg).fits
    changes = cheapest_changes(cfg, plan)
    assert 2 <= len(changes) <= 3
    assert all(change.plan.fits for change in changes)
    assert changes[0].settings == ('trainer.optimizer="adamw_8bit"',)


def test_the_largest_value_is_the_last_that_fits() -> None:
    cfg = load_config("first-light", ())

    def plan(some: Config) -> Any:
        class Fake:
            fits = some.trainer.group_size <= 16

        return Fake()

    assert largest(cfg, plan, "trainer.group_size", [2, 4, 8, 16, 32, 64]) == 16
    assert largest(cfg, plan, "trainer.group_size", [32, 64]) is None


def test_the_shape_is_a_minibatch_as_far_as_it_matters() -> None:
    cfg = load_config("first-light", ["trainer.prompts_per_step=12", "trainer.minibatches=3"])
    assert shape_of(cfg, 50).prompts == 4
    many = load_config("first-light", ["trainer.prompts_per_step=100000"])
    assert shape_of(many, 50).prompts < 100
    assert shape_of(many).prompt_tokens == many.rollout.max_prompt_tokens


@pytest.mark.parametrize("size", ["24", "0GiB", "-3GiB", "GiB", "many"])
def test_a_size_without_a_number_and_unit_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match="--gpu") as refusal:
        named_device(size)
    assert refusal.value.fix == 'Use a number with unit: "24GiB"'


def test_sizes_have_units() -> None:
    assert named_device("24GiB").memory == 24 * 2**30
    assert named_device("80 GB").memory == 80 * 10**9
    assert this_device(is_gpu=False).process > 2**27


@pytest.fixture
def run(tmp_path: Path) -> Config:
    return tiny_config(build_tiny_model(tmp_path / "model"), tmp_path / "run")


def test_a_tiny_run_needs_no_trace(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "plan_memory", None)
    machine = resolve_machine(run)
    found = predict(machine.settled(run), machine, run.model.path, prompt_tokens=40, given=run)
    assert found.plan is None and found.peak > this_device(is_gpu=False).process // 2


def test_a_run_that_cannot_fit_is_refused_before_its_weights_load(
    run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = Device(2**20, 2**20, counted=True)
    monkeypatch.setattr(check, "this_device", lambda **kind: little)
    monkeypatch.setattr("aepo_fast.training.run.Trainer", None)  # would load them
    with pytest.raises(ConfigError, match="trainer.check_memory") as refusal:
        train(run)
    assert "GiB" in refusal.value.reason and "aepo-fast plan" in refusal.value.fix


def test_a_refusal_names_changes(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = resolve_machine(run)
    settled = machine.settled(run)
    config = small(num_hidden_layers=1, hidden_size=512, vocab_size=20000)
    monkeypatch.setattr(check, "read_config", lambda folder, **trust: config)
    monkeypatch.setattr(check, "_upper_bound", lambda *some: 2**62)
    roomy = Device(2**40, 0, counted=True)
    monkeypatch.setattr(check, "this_device", lambda **kind: roomy)
    given = replace(run, model=ModelConfig(path=run.model.path))  # no dtype is settled
    known = {"prompt_tokens": 40, "given": given}
    needed = predict(settled, machine, run.model.path, **known).peak
    tight = Device(round(0.8 * needed), 0, counted=True)
    monkeypatch.setattr(check, "this_device", lambda **kind: tight)
    with pytest.raises(ConfigError) as refusal:
        predict(settled, machine, run.model.path, **known)
    assert refusal.value.fix.startswith("Set ")
    # A wrong prediction locks nobody out.
    trainer = replace(settled.trainer, check_memory=False)
    tried = replace(settled, trainer=trainer)
    assert predict(tried, machine, run.model.path, **known).peak == needed


def test_little_too_much_is_tried(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = resolve_machine(run)
    monkeypatch.setattr(check, "_upper_bound", lambda *some: 2**62)
    monkeypatch.setattr(check, "this_device", lambda **kind: Device(2**40, 0, counted=True))
    settled, known = machine.settled(run), {"prompt_tokens": 40, "given": run}
    needed = predict(settled, machine, run.model.path, **known).peak
    near = Device(round(needed / 1.05), 0, counted=True)
    monkeypatch.setattr(check, "this_device", lambda **kind: near)
    assert predict(settled, machine, run.model.path, **known).peak == needed
