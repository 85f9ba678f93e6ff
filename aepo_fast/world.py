"""The processes of a run, one a device, and what they tell each other.

torchrun starts them, or whatever sets its variables. Each plans the same step and holds all samples
of it; only the work is shared. Where there is one process, each method gives back what it got, and
torch.distributed is not touched.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from aepo_fast.config.errors import ConfigError
from aepo_fast.fresh_store import fresh_store
from aepo_fast.group_connections import noting_connections
from aepo_fast.report.phase import phase

Value = TypeVar("Value")
Key = TypeVar("Key")
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_joined: list[World] = []  # the world of this process, once it has joined


class RankError(RuntimeError):
    """An error of another rank that cannot be raised again here as it was."""


@dataclass(frozen=True)
class World:
    """A process among those of a run.

    rank: its number, from 0 to size - 1. local_rank: its number on its machine. control: a process
    group of gloo, None for one process; all ranks call the methods below in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: Any = None
    timeout_s: float = 1800.0
    # What needs no rank to wait for another: a store of torch, None for one process.
    store: Any = None
    calls: list[int] = field(default_factory=lambda: [0], compare=False)  # of the group, so far
    is_anew: bool = False  # the control group is the only one that still serves

    @property
    def is_first(self) -> bool:
        """Whether this process writes what a run writes once."""
        return self.rank == 0

    def shares(
        self, items: Sequence[Value], load: Callable[[Value], float] = lambda item: 1.0
    ) -> list[list[Value]]:
        """Every rank's part of a list: the largest first, each to whom has least, in their order.

        It needs no words between ranks: all of them have the same list.
        """
        if self.size == 1:
            return [list(items)]
        loads, parts = [0.0] * self.size, [list[int]() for _ in range(self.size)]
        for index in sorted(range(len(items)), key=lambda index: -load(items[index])):
            rank = loads.index(min(loads))
            parts[rank].append(index)
            loads[rank] += load(items[index])
        return [[items[index] for index in sorted(part)] for part in parts]

    def share(
        self, items: Sequence[Value], load: Callable[[Value], float] = lambda item: 1.0
    ) -> list[Value]:
        """This rank's own part of a list, see `shares`."""
        return self.shares(items, load)[self.rank]

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        # Not left to torch, whose pickle lacks the random state of numpy.
        return [pickle.loads(data) for data in self._exchange(_pickled(value))]

    def gather_on_first(self, value: Value) -> list[Value]:
        """Every rank's value on rank 0, in the order of ranks; none on the others."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.is_first else None
        with self._together():
            torch.distributed.gather_object(_pickled(value), found, group=self.control, group_dst=0)
        return [pickle.loads(data) for data in found or ()]

    def attempt(self, work: Callable[[], Value]) -> list[Value]:
        """Run `work`; every rank's value, or on all of them the error of the first that failed."""
        return self.gather(self.together(work))

    def together(self, work: Callable[[], Value]) -> Value:
        """Run `work`; this rank's own value, or on all of them the error of the first that failed.

        An error that cannot be made again on the other ranks is a RankError there.
        """
        if self.size == 1:
            return work()
        value: Any = None
        own: BaseException | None = None
        try:
            value = work()
        except BaseException as error:  # that of a checkpoint of torch is no Exception
            own = error
        found = self.gather(None if own is None else _Failure.of(own))
        for rank, failure in enumerate(found):
            if failure is not None:
                raise own if own is not None and rank == self.rank else failure.rebuilt(rank)
        return value

    def on_first(self, work: Callable[[], Value]) -> Value:
        """Run `work` on rank 0 alone; its value on all ranks, or its error."""
        if self.size == 1:
            return work()
        return self.attempt(lambda: work() if self.is_first else None)[0]  # type: ignore[return-value]

    def most(self, number: float) -> float:
        """The greatest of the ranks' numbers."""
        return number if self.size == 1 else max(self.gather(number))

    def add(self, *tensors: Tensor) -> None:
        """Add up each tensor over ranks, in place; all of them have the same sum, bit for bit."""
        if self.size == 1:
            return
        with self._together():
            for tensor in tensors:
                ours = tensor.cpu()
                torch.distributed.all_reduce(ours, group=self.control)
                if ours is not tensor:
                    tensor.copy_(ours)

    def sums(self, numbers: Mapping[Key, float]) -> dict[Key, float]:
        """Each name's numbers added up over ranks, in their order, where a rank has any."""
        total: dict[Key, float] = {}
        for part in self.gather(dict(numbers)):
            for name, number in part.items():
                total[name] = total.get(name, 0) + number
        return total

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            with self._together():
                torch.distributed.barrier(group=self.control)

    def for_a_thread(self) -> World:
        """The same with a control group of its own, for what runs beside the main thread."""
        if self.size == 1:
            return self
        return replace(self, control=_control(self.timeout_s), calls=[0])

    def anew(self) -> World:
        """The same with a new control group, for when nobody knows what waits in other groups."""
        if self.size == 1:
            return self
        return replace(self, control=_control(self.timeout_s), is_anew=True)

    def every(self, step: int) -> World:
        """Every `step`-th rank from this one on, and before it, as a world of their own."""
        if step == 1:
            return self
        return self._parted([range(one, self.size, step) for one in range(step)])

    def neighbours(self, count: int) -> World:
        """So many ranks in a row, this one among them, as a world of their own."""
        if count == 1:
            return ALONE
        starts = range(0, self.size, count)
        return self._parted([range(start, start + count) for start in starts])

    def _parted(self, parts: Sequence[range]) -> World:
        """The part that has this rank, as a world of its own; all ranks make the groups of all."""
        groups = [_control(self.timeout_s, part) for part in parts]
        (own,) = (number for number, part in enumerate(parts) if self.rank in part)
        rank, size = parts[own].index(self.rank), len(parts[own])
        return replace(self, rank=rank, size=size, control=groups[own], calls=[0])

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """While it is open, rank 0 alone prints to stdout."""
        if self.is_first:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield

    def _exchange(self, data: bytes) -> list[bytes]:
        found: list[Any] = [None] * self.size
        with self._together():
            torch.distributed.all_gather_object(found, data, group=self.control)
        return found

    @contextmanager
    def _together(self) -> Iterator[None]:
        self.calls[0] += 1
        with phase("waiting for other ranks"):
            yield


ALONE = World()


def is_started_with_others() -> bool:
    """Whether torchrun's variables say that this process is one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def join(*, on_gpu: bool, timeout_s: float) -> World:
    """The world that torchrun's variables describe; `ALONE` where they are not set.

    It is joined once a process, with NCCL beside gloo on GPUs. timeout_s: how long a rank waits
    for the others before it gives up. Raises ConfigError for variables that are not whole.
    """
    if _joined:
        return _joined[0]
    if not is_started_with_others():
        return ALONE
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if missing or not all(number.isdecimal() for number in numbers):
        reason = f"{', '.join(missing)} is not set" if missing else f"no numbers: {numbers}"
        fix = "Start with torchrun, which sets them, or unset WORLD_SIZE for one process"
        raise ConfigError("WORLD_SIZE", os.environ["WORLD_SIZE"], reason, fix)
    rank, size, local_rank = map(int, numbers)
    if on_gpu:
        torch.cuda.set_device(local_rank)
    store = fresh_store(rank, size, _patience(timeout_s))
    if not torch.distributed.is_initialized():  # whoever started us may have
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        where: dict[str, Any] = {"store": store, "rank": rank, "world_size": size}
        with noting_connections():
            torch.distributed.init_process_group(backend, **where, timeout=_patience(timeout_s))
    _joined.append(World(rank, size, local_rank, _control(timeout_s), timeout_s, store))
    return _joined[0]


def part() -> None:
    """Leave the world that was joined; another one may be joined then."""
    if _joined:
        _joined.clear()
        torch.distributed.destroy_process_group()


def _control(timeout_s: float, ranks: Sequence[int] | None = None) -> Any:
    given = None if ranks is None else list(ranks)
    with noting_connections():
        return torch.distributed.new_group(given, backend="gloo", timeout=_patience(timeout_s))


def _patience(timeout_s: float) -> timedelta:
    """How long torch waits: longer than `RankWatch`, which knows more of what is waited for."""
    return timedelta(seconds=timeout_s + 60)


@dataclass(frozen=True)
class _Failure:
    """What a rank tells the others of its error."""

    kind: str
    message: str
    pickled: bytes | None

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        pickled = None
        try:
            made = _pickled(error)
            again = pickle.loads(made)
            if (type(again), str(again)) == (type(error), str(error)):
                pickled = made
        except Exception:  # of an __init__ or of attributes of its own
            pass
        return cls(type(error).__name__, str(error), pickled)

    def rebuilt(self, rank: int) -> BaseException:
        if self.pickled is None:
            return RankError(f"rank {rank}: {self.kind}: {self.message}")
        return pickle.loads(self.pickled)


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in _UNSIGNED:  # torch's own cannot
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()
