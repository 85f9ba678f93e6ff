"""What ranks tell each other, by every method of their world."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.training.checkpoint import rng_state
from aepo_fast.training.interrupt import Interrupted
from aepo_fast.world import World


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


def talk(world: World) -> dict[str, Any]:
    """What a rank hears.

    torch's own gathering carries neither the random state of numpy, which is uint32, nor errors
    whose __init__ takes other arguments.
    """
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
    printed = io.StringIO()
    with redirect_stdout(printed), world.quiet():
        print("once")
    heard["printed"] = printed.getvalue()
    return heard


def raised_on_first(world: World) -> str:
    try:
        world.on_first(lambda: 1 // 0)
    except ZeroDivisionError as error:
        return str(error)
    return "nothing"


def check_what_was_heard(heard: list[dict[str, Any]]) -> None:
    """Of two ranks."""
    for rank, one in enumerate(heard):
        assert one.pop("who") == (rank, 2, rank, rank == 0)
        assert one.pop("together") == rank * 10
        assert one.pop("share") == ["aceg", "bdf"][rank].replace("", " ").split()
        assert one.pop("printed") == ("once\n" if rank == 0 else "")
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
