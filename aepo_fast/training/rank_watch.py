"""Keeps a run of several processes from waiting for one that cannot come.

Nobody who waits in a collective operation of torch can be told of another's error, so each process
has a thread that reads and writes a store, which needs nobody else. It shares signals. Where
another process has failed alone, it breaks what its own waits in, so that all can save together.
It ends its process where that does not help, or where nothing has gone on for too long.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.fresh_store import part_of
from aepo_fast.group_connections import break_connections
from aepo_fast.report.phase import phase_of, progress, progress_count
from aepo_fast.report.unexpected import SAID, describe, first_line, out_of_memory
from aepo_fast.training.interrupt import InterruptGuard
from aepo_fast.training.rank_agreement import in_words
from aepo_fast.world import World

_SECONDS = 0.5  # between two looks
_OTHERS_COME_S = 5.0  # where all fail alike, they do so within this time
_OTHERS_END_S = 10.0  # a process that waits in vain for one that has failed ends after it
_OTHERS_LEAVE_S = 30.0  # for an error of another one, each leaves its work within this time
_GO_ON = "Go on from the last checkpoint with --resume"
_SIGNAL, _FAILED, _STOPPED, _LEFT, _AT = "signal", "failed", "stopped", "left", "at"


class LostRankError(RuntimeError):
    """Another process of the run has failed or is gone; this one cannot go on without it.

    all_left: whether all have left their work for it, and can save together over a new group.
    """

    all_left = False


class RankWatch:
    """Watches over one process of a run while it is open; does nothing for a run of one process."""

    def __init__(self, world: World, guard: InterruptGuard, folder: Path) -> None:
        self.world, self._guard, self._folder = world, guard, folder
        if world.size > 1:  # one process may do several runs
            self._store = part_of(world.store, f"run {world.calls[0]}")
        self._thread = threading.get_ident()  # that which is watched
        self._ended = threading.Event()
        self._progress, self._since = progress_count(), time.monotonic()
        self._failed_since: float | None = None
        self._left = False  # whether the watched thread has come out of the run's work
        self._breaking, self._broken = threading.Lock(), False
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)

    def __enter__(self) -> RankWatch:
        if self.world.size > 1:
            self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.world.size == 1:
            return
        try:
            if isinstance(error, Exception) and not isinstance(error, LostRankError):
                self._end_together(error)
        finally:
            self._ended.set()
            self._watcher.join()

    @contextmanager
    def one_end(self) -> Iterator[None]:
        """Raise an error as it is where all processes have failed at the same place.

        Raises LostRankError in place of an error that others do not have. Those who wait for this
        process, within torch, are made to leave. All can save together over a new group then.
        """
        try:
            yield
        except Exception as error:
            if self.world.size > 1:
                self._left = True
                self._end_together(error, saves=True)
            raise

    def _end_together(self, error: Exception, *, saves: bool = False) -> None:
        """Return where all have failed at the same place, else raise LostRankError."""
        if _is_of_connection(error):
            words, has_failed = self._loss(first_line(error).split(". This is")[0])
            raise self._lost(words, saves=saves and has_failed) from error
        if self._all_come(f"{_STOPPED}/{self.world.calls[0]}", _OTHERS_COME_S):
            if not self.world.is_first:
                error.add_note(SAID)
            return
        words = f"rank {self.world.rank} failed alone: {self._words(error)}"
        with _ignoring_lost_stores():
            self._store.set(_FAILED, words)
        if not isinstance(error, ConfigError):
            raise self._lost(words, saves=saves) from error

    def _lost(self, words: str, *, saves: bool) -> LostRankError:
        """The error of a failure that not all processes have, when they are ready to save if so."""
        if not saves:
            return LostRankError(f"{words} {_GO_ON}")
        self._break()  # before there is a new group
        seconds = min(_OTHERS_LEAVE_S, self.world.timeout_s / 2)
        if not self._all_come(_LEFT, seconds):
            progress()
            self._left = False  # if its end takes long, it is ended
            late = f"Nothing is saved: not all ranks left their work within {seconds:g} s"
            return LostRankError(f"{words} {late}. {_GO_ON}")
        error = LostRankError(words)
        error.all_left = True
        return error

    def _break(self) -> None:
        """End what any thread of this process waits for of other processes."""
        with self._breaking:
            if not self._broken:
                self._broken = True
                break_connections(int(os.environ["MASTER_PORT"]))

    def _all_come(self, place: str, seconds: float) -> bool:
        """Whether all processes come to a place in time; each of them gets the same answer."""
        store, answer = self._store, f"{place}/all"
        names = [f"{place}/{rank}" for rank in range(self.world.size)]
        try:
            store.set(names[self.world.rank], "")
            _within(seconds, lambda: store.check(names) or store.check([answer]))
            found = "yes" if store.check(names) else "no"
            return store.compare_set(answer, "", found) == b"yes"  # that of the first counts
        except RuntimeError:  # of a store that is gone
            return False

    def _words(self, error: Exception) -> str:
        for one in (error, error.__cause__):  # an optimizer's step names its cause
            if isinstance(one, torch.OutOfMemoryError):
                return out_of_memory(one)
        if type(error).__module__.startswith("aepo_fast."):  # it says all
            return str(error)
        where = f"running aepo-fast: {phase_of(self._thread)}"
        return describe(error, where, self._folder)

    def _loss(self, reason: str) -> tuple[str, bool]:
        """What is known of a lost process, and whether it has failed rather than been killed."""
        store, found = self._store, ""
        with _ignoring_lost_stores():
            if _within(_OTHERS_COME_S + 2 * _SECONDS, lambda: store.check([_FAILED])):
                found = store.get(_FAILED).decode()
        if found:
            return f"rank {self.world.rank} stops: {found}", True
        return (
            f"rank {self.world.rank} has lost another rank, which was killed or whose machine is "
            f"gone: {reason}."
        ), False

    def _watch(self) -> None:
        while not self._ended.wait(_SECONDS):
            now, count = time.monotonic(), progress_count()
            if count != self._progress:
                self._progress, self._since = count, now
            with _ignoring_lost_stores():
                self._tell()
                self._share_signal()
                self._end_after_failure(now)
            if now - self._since > self.world.timeout_s:
                self._end(self._who_is_where())

    def _tell(self) -> None:
        at = self._at(), time.monotonic() - self._since
        self._store.set(f"{_AT}/{self.world.rank}", json.dumps(at))

    def _at(self) -> str:
        """The phase of the watched thread, and the line of code that it is at."""
        frame = sys._current_frames().get(self._thread)
        phase = phase_of(self._thread)
        if frame is None:
            return phase
        code = frame.f_code
        return f"{phase}, at {code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"

    def _share_signal(self) -> None:
        store, own = self._store, self._guard.received
        if own is not None:
            store.set(_SIGNAL, str(own))
        elif store.check([_SIGNAL]):
            self._guard.receive(int(store.get(_SIGNAL)))

    def _end_after_failure(self, now: float) -> None:
        if self._failed_since is None and self._store.check([_FAILED]):
            self._failed_since = now
            self._break()
        # Not if it goes on: then it comes to an end of its own.
        if self._failed_since is not None and not self._left:
            if now - max(self._since, self._failed_since) > _OTHERS_END_S:
                words = self._store.get(_FAILED).decode()
                self._end(f"rank {self.world.rank} stops: {words} {_GO_ON}")

    def _who_is_where(self) -> str:
        """What a run that hangs is doing, each rank."""
        world, phases = self.world, dict[str, list[int]]()
        for rank in range(world.size):
            with _ignoring_lost_stores():
                where, idle = json.loads(self._store.get(f"{_AT}/{rank}"))
                where += "" if idle > world.timeout_s / 2 else ", and goes on"
                phases.setdefault(where, []).append(rank)
        parts = [f"{in_words(ranks)} {where}" for where, ranks in phases.items()]
        return (
            f"rank {world.rank}: nothing has gone on for trainer.timeout_s = {world.timeout_s:g} s "
            f"while {phase_of(self._thread)}. Where each is: {'; '.join(parts)}. {_GO_ON}"
        )

    def _end(self, words: str) -> None:
        """End this process, whose main thread can hear of nothing."""
        print(f"error: {words}", file=sys.stderr, flush=True)
        os._exit(1)


def _within(seconds: float, done: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def _ignoring_lost_stores() -> Iterator[None]:
    """The store goes with the process that holds it; nobody learns more from it then."""
    try:
        yield
    except RuntimeError:  # torch's errors of distribution are
        pass


def _is_of_connection(error: BaseException) -> bool:
    """Whether an error is of torch's words with other processes."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)
