"""Ranks tell each other values and errors; one process touches no torch.distributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.training.checkpoint import rng_state
from aepo_fast.training.interrupt import Interrupted
from aepo_fast.world import ALONE, World, join, part
from tests.aepo_fast.world.ranks import run_ranks


class OddError(Exception):
    """It cannot be unpickled."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


class NoException(BaseException):
    """As the one of torch's checkpoints."""


def raised(world: World, rank: int, error: BaseException) -> str:
    def work() -> int:
        if world.rank == rank:
            raise error
        return world.rank

    try:
        world.attempt(work)
    except BaseException as found:
        return f"{type(found).__name__}: {found}"
    return "nothing"


def talk() -> dict[str, Any]:
    """What a rank hears."""
    world = join(on_gpu=False, timeout_s=60)
    assert join(on_gpu=False, timeout_s=60) is world and torch.distributed.is_initialized()
    own, by_thread = torch.arange(3.0) + world.rank, world.for_a_thread()
    world.add(own)
    np.random.seed(world.rank)
    states = world.gather(rng_state(with_gpu=False))
    world.wait()
    heard = {
        "who": (world.rank, world.size, world.local_rank, world.is_first),
        "gather": world.gather({"rank": world.rank}),
        "thread": by_thread.gather(world.rank),
        "attempt": world.attempt(lambda: world.rank * 10),
        "together": world.together(lambda: world.rank * 10),
        "first": world.on_first(lambda: world.rank + 7),
        "most": world.most(5 - world.rank),
        "add": own.tolist(),
        "sums": world.sums({"both": 1.5, f"of {world.rank}": 2}),
        "keys": [np.random.RandomState(rank).get_state()[1].tolist() for rank in range(world.size)]
        == [state["numpy"][1].tolist() for state in states],
        "share": world.share("abcdefg"),
        "config": raised(world, 1, ConfigError("a", 1, "b", "c")),
        "signal": raised(world, 1, Interrupted(15)),
        "odd": raised(world, 1, OddError(1, 2)),
        "no exception": raised(world, 1, NoException("full")),
        "on first": raised_on_first(world),
    }
    with world.quiet():
        print(f"printed by {world.rank}")
    part()
    assert not torch.distributed.is_initialized()
    return heard


def raised_on_first(world: World) -> str:
    try:
        world.on_first(lambda: 1 // 0)
    except ZeroDivisionError as error:
        return str(error)
    return "nothing"


def test_ranks_hear_the_same(tmp_path: Path) -> None:
    heard = run_ranks("tests.aepo_fast.world.test_world:talk", 2, tmp_path)
    for rank, one in enumerate(heard):
        assert one.pop("who") == (rank, 2, rank, rank == 0)
        assert one.pop("together") == rank * 10
        assert one.pop("share") == ["aceg", "bdf"][rank].replace("", " ").split()
        odd = one.pop("odd")
        assert odd == ("RankError: rank 1: OddError: 1 and 2", "OddError: 1 and 2")[rank]
        assert one == {
            "gather": [{"rank": 0}, {"rank": 1}],
            "thread": [0, 1],
            "attempt": [0, 10],
            "first": 7,
            "most": 5,
            "add": [1.0, 3.0, 5.0],
            "sums": {"both": 3.0, "of 0": 2, "of 1": 2},
            "keys": True,
            "config": "ConfigError: a = 1: b. c.",
            "signal": "Interrupted: SIGTERM",
            "no exception": "NoException: full",
            "on first": "integer division or modulo by zero",
        }
    logs = [(tmp_path / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert "printed by 0" in logs[0] and "printed by" not in logs[1]


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


def test_neighbours_are_ranks_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aepo_fast.world._control", lambda timeout_s, ranks: list(ranks))
    two = World(rank=2, size=6, control="all").neighbours(2)
    assert (two.rank, two.size, two.control) == (0, 2, [2, 3])
    three = World(rank=5, size=6, control="all").neighbours(3)
    assert (three.rank, three.size, three.control) == (2, 3, [3, 4, 5])
    assert World(rank=2, size=6).neighbours(1) is ALONE
