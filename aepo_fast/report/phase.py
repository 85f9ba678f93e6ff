"""What a thread is doing, for whoever watches it from another one."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

_open: dict[int, list[str]] = defaultdict(list)  # of each thread, the innermost last
_count = [0]


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Say that `what` is being done, e.g. "an update", until it ends; also a decorator."""
    own = _open[threading.get_ident()]
    own.append(what)
    progress()
    try:
        yield
    finally:
        own.pop()
        progress()


def progress() -> None:
    """Count a sign of life: a token, a micro-batch, a phase."""
    _count[0] += 1


def progress_count() -> int:
    """How many signs of life there have been."""
    return _count[0]


def phase_of(thread: int) -> str:
    """What a thread is doing, from the outermost phase to the innermost."""
    return ", ".join(_open[thread]) or "between two phases"
