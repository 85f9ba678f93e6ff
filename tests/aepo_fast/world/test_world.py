"""Ranks tell each other values and errors; one process touches no torch.distributed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aepo_fast.config import resolve
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.over_ranks import check_parts
from aepo_fast.config.sections import LoraConfig, RolloutConfig
from aepo_fast.model.batch import Layout
from aepo_fast.model.rank_batches import microbatches_of_rank
from aepo_fast.samples import Completion, Sample
from aepo_fast.world import ALONE, World, join, part
from tests.aepo_fast.world.talk import OddError
from tests.tiny_run import tiny_config


def test_shares_are_whole_and_even() -> None:
    world, loads = World(rank=1, size=3), [5, 1, 9, 3, 3, 7]
    parts = world.shares(range(6), lambda index: loads[index])
    assert parts == [[2], [4, 5], [0, 1, 3]] and world.share(range(6)) == [1, 4]
    assert sorted(sum(parts, [])) == list(range(6))
    assert world.shares([]) == [[], [], []]


def test_alone_torch_distributed_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch, "distributed", None)
    world, tensor = join(on_gpu=False, timeout_s=1), torch.ones(2)
    assert world is ALONE and world.for_a_thread() is world
    world.add(tensor)
    world.wait()
    with world.quiet():
        assert tensor.tolist() == [1, 1]
    assert world.gather(3) == world.attempt(lambda: 3) == [3]
    assert world.together(lambda: 3) == world.on_first(lambda: 3) == world.most(3) == 3
    assert world.share("ab") == ["a", "b"] and world.sums({"a": 2}) == {"a": 2}
    with pytest.raises(OddError):
        world.attempt(lambda: (_ for _ in ()).throw(OddError(1, 2)))
    part()


@pytest.mark.parametrize(("name", "value"), [("RANK", ""), ("RANK", "one"), ("MASTER_ADDR", "")])
def test_variables_that_are_not_whole_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    whole = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for key, given in (whole | {name: value}).items():
        monkeypatch.setenv(key, given)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE = '2': .*torchrun"):
        join(on_gpu=False, timeout_s=1)


@pytest.mark.parametrize(
    ("section", "changes", "key"),
    [
        ("trainer", {"optimizer": "muon"}, "trainer.optimizer"),
        ("trainer", {"offload": "optimizer"}, "trainer.offload"),
        # The hooks that give its float32 copies their gradients are never called for shards.
        ("model", {"dtype": "bfloat16", "compute_dtype": "auto"}, "model.dtype"),
        ("model", {"quantization": "nf4", "lora": LoraConfig(rank=2)}, "model.quantization"),
        ("model", {"liger": True}, "model.liger"),
    ],
)
def test_what_needs_one_process_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, section: str, changes: Any, key: str
) -> None:
    cfg = tiny_config(tmp_path / "no model", tmp_path)
    cfg = replace(cfg, **{section: replace(getattr(cfg, section), **changes)})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(resolve, "check_no_offloading", lambda cfg: None)
    with pytest.raises(ConfigError, match=rf"{key} = .*WORLD_SIZE says there are several"):
        resolve.resolve_machine(cfg)


@pytest.mark.parametrize("layout", ["shared", "padded", "packed"])
@pytest.mark.parametrize("max_tokens", [1, 12, 1000])
@pytest.mark.parametrize("prompts", [0, 1, 5])
def test_ranks_have_equally_many_microbatches_and_each_sample_once(
    layout: Layout, max_tokens: int, prompts: int
) -> None:
    samples = [
        Sample(Completion((1, prompt), (3,) * length, (), "stop", 1.0, 0), prompt, False, 1.0)
        for prompt in range(prompts)
        for length in (2, 5, 0, 3)
    ]
    indices = range(len(samples))
    parts = [
        microbatches_of_rank(
            World(rank, 3), samples, indices, layout=layout, max_tokens=max_tokens, batch_tokens=1
        )
        for rank in range(3)
    ]
    assert len({len(part) for part in parts}) == 1
    real = [index for part in parts for batch in part if not batch.idle for index in batch.samples]
    assert sorted(real) == [index for index in indices if samples[index].length]
    idle = {batch.samples for part in parts for batch in part if batch.idle}
    assert idle <= {(0,)}  # the shortest


def test_neighbours_are_ranks_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aepo_fast.world._control", lambda timeout_s, ranks: list(ranks))
    two = World(rank=2, size=6, control="all").neighbours(2)
    assert (two.rank, two.size, two.control) == (0, 2, [2, 3])
    three = World(rank=5, size=6, control="all").neighbours(3)
    assert (three.rank, three.size, three.control) == (2, 3, [3, 4, 5])
    assert World(rank=2, size=6).neighbours(1) is ALONE


@pytest.mark.parametrize("size", [1, 3])
def test_ranks_that_sample_together_divide_all(tmp_path: Path, size: int) -> None:
    cfg = tiny_config(tmp_path, tmp_path, rollout=RolloutConfig("vllm", tensor_parallel=2))
    with pytest.raises(ConfigError, match=rf"rollout.tensor_parallel = 2: {size} processes"):
        check_parts(cfg, size, "chunked")
    check_parts(cfg, 2 * size, "chunked")
    if size == 1:
        with pytest.raises(ConfigError, match="rollout.tensor_parallel"):
            resolve.resolve_machine(cfg)
        assert resolve.resolve_machine(cfg, trains=False)  # an evaluation takes one device


def test_ranks_that_sample_together_are_refused_ahead() -> None:
    with pytest.raises(ConfigError, match=r"rollout.tensor_parallel = 2: .*in a thread"):
        RolloutConfig("vllm", tensor_parallel=2, steps_ahead=1)
