"""A process loads its own part of a model, bit for bit, and never holds more than that."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import LoraConfig, ModelConfig
from aepo_fast.memory.live_storages import LiveStorages
from aepo_fast.model import load_parts as module
from aepo_fast.model.cpu_layers import fused_kinds
from aepo_fast.model.load import load_model
from aepo_fast.model.load_parts import load_parts, own_ranges, weight_files
from aepo_fast.model.sharded import device_mesh, shard
from aepo_fast.world import World
from tests.tiny_run import a_machine

SIZE, RANK = 4, 1


class InMemory(LiveStorages):
    """Counts what is in memory, not in mapped files, and of a shard only itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.set_.source_Storage:  # safetensors' view of a file
            found = func(*args, **(kwargs or {}))
            self.ignore([found])
            return found
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _note(self, tensor: torch.Tensor, *, counted: bool) -> None:
        if not (tensor.is_meta or is_traceable_wrapper_subclass(tensor)):
            super()._note(tensor, counted=counted)


@pytest.fixture(scope="module")
def untied_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with biases, an untied head and a ragged vocabulary, in several files."""
    folder = tmp_path_factory.mktemp("qwen")
    config = Qwen2Config(
        vocab_size=301,
        hidden_size=32,
        intermediate_size=66,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
        for parameter in model.parameters():
            parameter.data.normal_()
    narrow: Any = model.to(torch.bfloat16)  # type: ignore[arg-type]
    narrow.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_of_four(untied_qwen: Path) -> Iterator[None]:
    """This is one of four processes, whose words to each other go nowhere."""
    distributed.init_process_group("fake", rank=RANK, world_size=SIZE, store=FakeStore())
    yield
    distributed.destroy_process_group()


def machine_of(*, split: int = 1, replicas: int = 1) -> Machine:
    """Its machine."""
    data = World(RANK // split, SIZE // split)
    parts: Any = {"tensor_parallel": split, "replicas": replicas, "data": data}
    return dataclasses.replace(a_machine(), world=World(RANK, SIZE), **parts)


def local(model: PreTrainedModel) -> dict[str, Any]:
    """This process's part of each weight."""
    return dict(model.named_parameters(remove_duplicate=False))


LORA = LoraConfig(rank=4, targets=("q_proj", "down_proj", "lm_head"))


@pytest.mark.parametrize(
    ("untied", "split", "replicas", "lora"),
    [(False, 1, 1, None), (False, 2, 1, None), (True, 2, 1, None), (True, 2, 2, None)]
    + [(False, 1, 2, LORA)],
)
def test_each_part_is_that_of_the_whole(
    tiny_model_dir: Path,
    untied_qwen: Path,
    untied: bool,
    split: int,
    replicas: int,
    lora: LoraConfig | None,
) -> None:
    folder = untied_qwen if untied else tiny_model_dir
    cfg = ModelConfig(path=str(folder), lora=lora or LoraConfig(), gradient_checkpointing="full")
    machine = machine_of(split=split, replicas=replicas)
    mesh = device_mesh(machine)
    whole = load_model(cfg, folder, machine, seed=3)
    shapes = {name: one.shape for name, one in local(whole).items()}
    kinds = fused_kinds(whole)
    shard(whole, machine, mesh, offload=False)  # torch and transformers divide it
    model = load_parts(cfg, folder, machine, mesh, seed=3)
    ours, theirs = local(model), local(whole)
    assert ours.keys() == theirs.keys() == shapes.keys()
    for name, part in ours.items():
        assert part.shape == shapes[name] and not part.is_meta
        assert part.placements == theirs[name].placements
        assert torch.equal(part.to_local(), theirs[name].to_local()), name
        assert part.requires_grad == theirs[name].requires_grad
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffers[name], one) for name, one in whole.named_buffers())
    head, embedding = (one.weight for one in (model.lm_head, model.model.embed_tokens))
    assert (head is embedding) != untied or lora is not None
    assert fused_kinds(model) == kinds
    assert model.training and model.generation_config == whole.generation_config
    assert model.config.to_dict() == whole.config.to_dict()
    frozen = load_parts(cfg, folder, machine, mesh, frozen=True) if lora is None else None
    if frozen is not None:
        assert not frozen.training and not any(one.requires_grad for one in frozen.parameters())


def test_a_process_holds_no_more_than_its_part(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = module._slice

    def counted(*args: Any) -> torch.Tensor:
        found = plain(*args)
        read.append(found.numel() * 4)
        return found

    monkeypatch.setattr(module, "_slice", counted)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    whole = sum(one.numel() * 4 for one in model.parameters())
    cfg = ModelConfig(path=str(tiny_model_dir))
    machine = machine_of(split=2)
    mesh = device_mesh(machine)
    with InMemory(unit=1) as storages:
        storages.begin("load")
        before = storages.live
        model = load_parts(cfg, tiny_model_dir, machine, mesh)
    shards: Any = model.parameters()
    own = sum(one.to_local().numel() * 4 for one in shards)
    assert own < 0.26 * whole
    # Beside the shards, what is read at once: at most the largest one, twice where it is cast.
    assert sum(read) == own and max(read) < 0.2 * whole
    assert storages.peaks["load"] - before < own + 2 * max(read)


def test_other_names_in_the_files_are_said(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cfg = ModelConfig(path=str(tiny_model_dir))
    files = weight_files(tiny_model_dir)
    files.pop("model.norm.weight")
    monkeypatch.setattr(module, "weight_files", lambda folder: files)
    machine = machine_of()
    model = load_parts(cfg, tiny_model_dir, machine, device_mesh(machine))
    assert all(own_ranges(one)[0][1] for one in model.parameters())
    assert "other names than the model's: each process loads all" in capsys.readouterr().out
