"""Whole runs with offloading, on a CPU: they end as runs without, and their checkpoints go on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aepo_fast.config import resolve
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import Config, LoraConfig
from aepo_fast.config.toml import load_config
from aepo_fast.model.load import load_model
from aepo_fast.model.sharded import device_mesh, leave, shard, whole_weights
from aepo_fast.training import assemble
from aepo_fast.training import update as update_module
from aepo_fast.training.run import train
from aepo_fast.training.trainer import Trainer
from tests.aepo_fast.training.test_run import metrics_of
from tests.tiny_run import a_machine, copy_until, tiny_config

LORA = LoraConfig(rank=4, targets=("q_proj", "down_proj", "lm_head"))
ADAPTER, WEIGHTS = "adapter_model.safetensors", "model.safetensors"


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloading as on a GPU, from CPU memory to CPU memory.

    Gradients of tied embeddings are added up as on a GPU, too: as sparse ones they come in another
    order.
    """
    monkeypatch.setattr(resolve, "check_no_offloading", lambda cfg: None)
    dense = property(lambda self: False, lambda self, value: None)
    monkeypatch.setattr(torch.nn.Embedding, "sparse", dense, raising=False)


def config(folder: Path, output: Path, offload: Any, /, **changes: Any) -> Config:
    """4 steps of 2 updates. The sampler has a copy of the weights, in another dtype."""
    cfg = tiny_config(folder, output)
    sections = {
        "trainer": {"offload": offload},
        "rollout": {"dtype": "bfloat16"},
        "checkpoint": {"keep": 9},
    }
    for name, values in changes.items():
        sections[name] = sections.get(name, {}) | values
    parts: dict[str, Any] = {
        name: replace(getattr(cfg, name), **values) for name, values in sections.items()
    }
    return replace(cfg, **parts)


def saved(cfg: Config) -> dict[str, torch.Tensor]:
    folder = Path(cfg.output_dir) / "checkpoints" / f"step_{cfg.trainer.steps}"
    return load_file(folder / (ADAPTER if cfg.model.lora.rank else WEIGHTS))


def assert_same_end(one: Config, other: Config) -> None:
    ours, theirs = saved(one), saved(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert metrics_of(one) == metrics_of(other)


# Passive samples, of AEPO as published, are measured without a backward pass: the head that was
# whole for them must not be taken for the next update's.
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {"model": {"gradient_checkpointing": "full", "activation_offloading": True}},
    "one update": {"loss": {"kl_coef": 0.1}, "trainer": {"minibatches": 1, "steps": 3}},
    "lora": {
        "model": {"lora": LORA},
        "loss": {"kl_coef": 0.1},
        "trainer": {"minibatches": 1, "steps": 3},
    },
    "8 bit": {"trainer": {"optimizer": "adamw_8bit", "steps": 2}},
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_weights_in_cpu_memory_end_as_those_on_the_device(
    no_gpu_needed: None, tiny_model_dir: Path, tmp_path: Path, variant: str
) -> None:
    plain, offloaded = (
        config(tiny_model_dir, tmp_path / name, name, **VARIANTS[variant])
        for name in ("none", "all")
    )
    assert train(plain) == train(offloaded) == 0
    assert_same_end(plain, offloaded)
    assert not torch.distributed.is_initialized()


def test_whole_weights_are_what_the_shards_hold(tiny_model_dir: Path) -> None:
    cfg = tiny_config(tiny_model_dir, tiny_model_dir)
    model = load_model(cfg.model, tiny_model_dir, a_machine(), stays_on_cpu=True)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    shard(model, a_machine(), device_mesh(a_machine()), offload=True)
    try:
        for _ in range(2):  # an engine finds them where they were
            found = dict(whole_weights(model))
            assert found.keys() == before.keys()
            for name, tensor in found.items():
                assert type(tensor) is torch.Tensor and torch.equal(tensor, before[name])
            places = [one.data_ptr() for one in found.values()]
            assert places == [one.data_ptr() for _, one in whole_weights(model)]
            model(input_ids=torch.arange(9)[None]).logits.sum().backward()
    finally:
        leave()


def test_in_bfloat16_they_differ_by_rounding(
    no_gpu_needed: None, tiny_model_dir: Path, tmp_path: Path
) -> None:
    steps = []
    for name in ("none", "all"):
        dtypes = {"model": {"compute_dtype": "bfloat16"}, "trainer": {"steps": 1}}
        cfg = config(tiny_model_dir, tmp_path / name, name, **dtypes)
        assert train(cfg) == 0
        steps.append(metrics_of(cfg)[-1])
    for key in ("loss", "grad_norm", "entropy"):
        assert steps[0][key] == pytest.approx(steps[1][key], rel=0.02), key


@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_a_checkpoint_goes_on_with_and_without_offloading(
    no_gpu_needed: None, tiny_model_dir: Path, tmp_path: Path, offload: str
) -> None:
    plain = config(tiny_model_dir, tmp_path / "plain", "none")
    assert train(plain) == 0
    away = config(tiny_model_dir, tmp_path / "away", offload)
    copy_until(1, plain, away)
    assert train(away, resume=True) == 0
    assert_same_end(plain, away)
    back = config(tiny_model_dir, tmp_path / "back", "none")
    copy_until(3, away, back)
    assert train(back, resume=True) == 0
    assert_same_end(plain, back)


class AwakeOrAsleep:
    """An engine that notes what of the optimizer's state is on the device while it is awake."""

    def __init__(self, engine: Any, seen: list[tuple[str, bool]]) -> None:
        self.engine, self.seen = engine, seen
        self.trainer: Trainer | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def note(self, what: str) -> None:
        parts = [] if self.trainer is None else self.trainer.parked
        self.seen.append((what, all(part.away for part in parts)))

    def generate(self, *args: Any, **options: Any) -> Any:
        self.note("generate")
        return self.engine.generate(*args, **options)

    def sleep(self) -> None:
        self.note("sleep")

    def sync_weights(self, *args: Any) -> None:
        self.note("sync")
        self.engine.sync_weights(*args)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizers_state_is_away_while_the_sampler_is_awake(
    no_gpu_needed: None,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
) -> None:
    seen: list[tuple[str, bool]] = []
    made = AwakeOrAsleep(None, seen)

    def load_engine(*args: Any, **options: Any) -> Any:
        made.engine = hf_engine(*args, **options)
        return made

    def guarded_step(*args: Any, **options: Any) -> Any:
        made.note("step")
        return plain_step(*args, **options)

    def build(self: Trainer, cfg: Config, *args: Any) -> None:
        object.__setattr__(cfg.rollout, "offload_optimizer", True)  # as with vLLM
        made.trainer, self.parked = self, []
        plain_init(self, cfg, *args)

    hf_engine, plain_init = assemble.load_engine, Trainer.__init__
    plain_step = update_module.guarded_step
    plain = config(tiny_model_dir, tmp_path / "plain", "none", trainer={"optimizer": optimizer})
    assert train(plain) == 0
    away = replace(plain, output_dir=str(tmp_path / "away"))
    with monkeypatch.context() as patch:
        patch.setattr(assemble, "load_engine", load_engine)
        patch.setattr(update_module, "guarded_step", guarded_step)
        patch.setattr(Trainer, "__init__", build)
        assert train(away) == 0
    step = [("generate", True), ("sleep", True), ("step", False), ("step", False), ("sync", True)]
    assert seen == [("sync", True), *step * 4]
    assert_same_end(plain, away)

    # A checkpoint is the same as ever.
    back = replace(plain, output_dir=str(tmp_path / "back"))
    copy_until(2, away, back)
    assert train(back, resume=True) == 0
    assert_same_end(plain, back)


def test_memory_in_use_is_in_the_metrics(tiny_model_dir: Path, tmp_path: Path) -> None:
    cfg = config(tiny_model_dir, tmp_path / "run", "none", trainer={"steps": 1})
    assert train(cfg) == 0
    (line,) = (json.loads(one) for one in (tmp_path / "run" / "metrics.jsonl").open())
    phases = [f"memory/{name}_gib" for name in ("sample_before", "sample_after", "train_before")]
    for name in (*phases, "memory/train_after_gib"):
        assert 0.1 < line[name] <= line["perf/peak_memory_gib"] + 0.01


def test_alone_and_without_offloading_no_process_group_is_made(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", None)  # importing it fails
    cfg = tiny_config(tiny_model_dir, tmp_path)
    assert train(replace(cfg, trainer=replace(cfg.trainer, steps=1))) == 0


def test_the_optimizers_state_leaves_a_gpu_only(tmp_path: Path) -> None:
    settings = ["rollout.backend=vllm", "rollout.offload_optimizer=true", "trainer.device=cpu"]
    cfg = load_config("first-light", settings)
    with pytest.raises(ConfigError, match=r"rollout\.offload_optimizer = True: .* is a CPU"):
        train(cfg)


@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_offloading_needs_a_gpu(tmp_path: Path, offload: str) -> None:
    cfg = config(tmp_path / "no model", tmp_path / "run", offload)
    with pytest.raises(ConfigError, match=rf"trainer\.offload = '{offload}': .* is a CPU"):
        train(cfg)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trainer": {"optimizer": "muon"}}, "the processor would take Muon's step"),
        ({"model": {"dtype": "bfloat16", "compute_dtype": "auto"}}, "float32 copies are not made"),
        ({"model": {"liger": True}}, "is checked there, without Liger"),
    ],
)
def test_what_weights_in_cpu_memory_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    config(tmp_path, tmp_path, "optimizer", **changes)
    with pytest.raises(ConfigError, match=rf"trainer\.offload = 'all': .*{reason}"):
        config(tmp_path, tmp_path, "all", **changes)


def test_samples_from_weights_in_cpu_memory_are_refused(
    no_gpu_needed: None, tiny_model_dir: Path, tmp_path: Path
) -> None:
    cfg = config(tiny_model_dir, tmp_path / "run", "all", rollout={"dtype": "float32"})
    with pytest.raises(ConfigError, match="'all': with rollout.dtype = model.dtype = 'float32'"):
        train(cfg)


def test_a_model_whose_layers_cannot_be_told_apart(
    no_gpu_needed: None, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aepo_fast.model.sharded.GradientCheckpointingLayer", ())
    with pytest.raises(ConfigError, match="'all': the layers of LlamaForCausalLM cannot be told"):
        train(config(tiny_model_dir, tmp_path / "run", "all"))
    assert not torch.distributed.is_initialized()
