"""Ranks of a sharded vocabulary as threads of one process, in place of torch.distributed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

_R = TypeVar("_R")


class _Ranks:
    """The group of the threads; every one of them makes the same collective calls."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier = world, threading.Barrier(world, timeout=60)
        self.rank = threading.local()
        self.parts: list[Tensor | None] = [None] * world

    def all_reduce(
        self, tensor: Tensor, op: object = dist.ReduceOp.SUM, group: object = None
    ) -> None:
        self.parts[self.rank.number] = tensor.clone()
        self.barrier.wait()
        parts = torch.stack([part for part in self.parts if part is not None])
        self.barrier.wait()
        tensor.copy_(parts.amax(0) if op == dist.ReduceOp.MAX else parts.sum(0))

    def work(self, number: int, function: Callable[[int], _R]) -> _R:
        self.rank.number = number
        try:
            return function(number)
        except BaseException:
            self.barrier.abort()  # the others would wait for ever
            raise


def in_ranks(world: int, function: Callable[[int], _R]) -> list[_R]:
    """What `function` of a rank's number returns, for all ranks at once."""
    ranks = _Ranks(world)
    with (
        patch.object(dist, "all_reduce", ranks.all_reduce),
        patch.object(dist, "is_initialized", lambda: True),
        patch.object(dist, "get_world_size", lambda group=None: world),
        ThreadPoolExecutor(world) as pool,
    ):
        return list(pool.map(lambda number: ranks.work(number, function), range(world)))
