"""An error of one rank within a pass of the model, where others wait for it within torch.

All stop with it and save what one process saves: the last finished step, and nothing in the middle
of one.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from aepo_fast.config.sections import Config, LoraConfig
from aepo_fast.training import rank_watch
from aepo_fast.training.interrupt import InterruptGuard
from aepo_fast.training.optim import HalfUpdateError
from aepo_fast.training.rank_watch import RankWatch
from aepo_fast.training.run import train
from aepo_fast.training.trainer import Trainer
from aepo_fast.world import ALONE, World, part
from tests.aepo_fast.world.ranks import run_ranks
from tests.aepo_fast.world.runs import lines_of, run_config, weights_of, with_output


@dataclass(frozen=True)
class Fault:
    """An error in the last layer, in an update of step 3, on one rank."""

    rank: int
    first_update: bool
    in_backward: bool


FAULTS = {
    "forward": Fault(rank=1, first_update=True, in_backward=False),
    "backward": Fault(rank=0, first_update=True, in_backward=True),
    "second update": Fault(rank=1, first_update=False, in_backward=True),
    "adapter": Fault(rank=2, first_update=True, in_backward=False),
}
LORA = LoraConfig(rank=4, targets=("q_proj", "down_proj"))
WORDS = "while training, in step 3: RuntimeError: a fault of one rank"


def fails(*args: Any) -> None:
    raise RuntimeError("a fault of one rank")


def fails_backward(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
    output.register_hook(fails)


@contextmanager
def arranged(fault: Fault) -> Iterator[None]:
    original = Trainer._update

    def with_fault(trainer: Trainer, *args: Any, first: bool) -> Any:
        here = int(os.environ.get("RANK", fault.rank)) == fault.rank
        if here and trainer.steps_done == 2 and first == fault.first_update:
            layer: Any = trainer.model.get_decoder().layers[-1]
            if fault.in_backward:
                layer.mlp.register_forward_hook(fails_backward)
            else:
                layer.mlp.register_forward_pre_hook(fails)
        return original(trainer, *args, first=first)

    Trainer._update = with_fault  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer._update = original  # type: ignore[method-assign]


def end_with(cfg: Config, fault: Fault) -> tuple[str, float]:
    """What a run says that has a fault, and how long it takes."""
    began = time.monotonic()
    with arranged(fault):
        try:
            train(cfg)
        except Exception as error:
            notes = getattr(error, "__notes__", [])
            words = " ".join([f"{type(error).__name__}: {error}", *notes])
            return words, time.monotonic() - began
    return "nothing", 0.0


def end_each(
    undisturbed: list[Config], runs: dict[str, Config], ports: list[int]
) -> dict[str, Any]:
    """What each rank sees of runs with a fault, each of which goes on afterwards."""
    torch.set_num_threads(1)
    rank_watch._OTHERS_COME_S = rank_watch._OTHERS_END_S = 1.0
    found: dict[str, Any] = {}
    assert all(train(cfg) == 0 for cfg in undisturbed)
    for (name, cfg), port in zip(runs.items(), ports, strict=True):
        found[name] = end_with(cfg, FAULTS[name]), checkpoints_of(cfg)
        part()
        os.environ["MASTER_PORT"] = str(port)
        assert train(cfg, resume=True) == 0
    part()
    return found


def checkpoints_of(cfg: Config) -> list[str]:
    folder = Path(cfg.output_dir) / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.mark.slow
def test_all_stop_and_save_as_one_process_does(tiny_model_dir: Path, tmp_path: Path) -> None:
    whole = run_config(tiny_model_dir, tmp_path / "whole", {})
    adapter = run_config(tiny_model_dir, tmp_path / "whole adapter", {"model": {"lora": LORA}})
    undisturbed = {name: adapter if name == "adapter" else whole for name in FAULTS}
    runs = {name: with_output(undisturbed[name], tmp_path / name) for name in FAULTS}
    work = "tests.aepo_fast.world.test_lone_errors:end_each"
    found = run_ranks(work, 3, tmp_path, [whole, adapter], runs, free_ports(len(runs)))
    for name, cfg in runs.items():
        one = with_output(cfg, tmp_path / f"{name}, alone")
        said, _ = end_with(one, FAULTS[name])
        last = said[said.index("in step 3 ") + 10 :].replace(one.output_dir, cfg.output_dir)
        for rank, ((words, seconds), written) in enumerate(row[name] for row in found):
            alone = f"rank {FAULTS[name].rank} failed alone: {WORDS}. The traceback is in "
            stops = "" if rank == FAULTS[name].rank else f"rank {rank} stops: "
            assert words.startswith(f"LostRankError: {stops}{alone}")
            assert words.endswith(f" {last}") and seconds < 30, (name, words, said)
            assert written == checkpoints_of(one)
        assert ("Saved" in last) is FAULTS[name].first_update
        ours, expected = weights_of(cfg), weights_of(undisturbed[name])
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in expected), name
        assert [line["step"] for line in lines_of(cfg)] == [1, 2, 3, 4]


def test_a_process_without_memory_says_what_needs_less(tmp_path: Path) -> None:
    watch, words = RankWatch(ALONE, InterruptGuard(), tmp_path), "CUDA out of memory. Tried 2 GiB"
    error, half = torch.OutOfMemoryError(f"{words}.\nMore"), HalfUpdateError("OutOfMemoryError")
    half.__cause__ = error
    for one in (error, half):
        assert watch._words(one).startswith(f"{words}: lower trainer.tokens_per_microbatch or ")


def test_all_get_the_same_answer_whether_all_came(tmp_path: Path) -> None:
    store, guard = torch.distributed.HashStore(), InterruptGuard()  # type: ignore[attr-defined]
    early, late = (RankWatch(World(rank, 2, store=store), guard, tmp_path) for rank in (0, 1))
    assert not early._all_come("one place", 0.1)
    assert not late._all_come("one place", 0.1)  # though both are there by now
    with ThreadPoolExecutor() as threads:
        assert all(threads.map(lambda one: one._all_come("another", 20), (early, late)))
