"""Memory that a run on the CPU frees: most of it is kept, since it is soon needed again."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4

_keeps = False  # since `keep_freed_memory`
_returns = False  # since `return_freed_memory`


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, instead of giving it back and asking for it page by page.

    A step allocates the same large tensors again and again, and on a CPU a fresh page costs more
    than the work on it. Only where malloc is glibc's and no MALLOC_ variable says otherwise;
    returns whether it was done.
    """
    global _keeps
    if not _is_ours():
        return False
    # Big blocks come from the heap as well, and the heap does not shrink.
    _keeps = _set((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26))
    return _keeps


def return_freed_memory() -> bool:
    """Let malloc give large blocks back as soon as they are free, in one of several processes.

    FSDP2 and gloo make and free whole weights all the time, some of them in threads of their own.
    Heaps that keep what is freed get large holes from it. Returns whether it was done, on the terms
    of `keep_freed_memory`.
    """
    global _returns
    _returns = _is_ours() and _set((_MMAP_THRESHOLD, 2**20))
    return _returns


def return_holes() -> None:
    """Give back the free pages within heaps, after `return_freed_memory`: some 50 ms' work."""
    if _returns:
        ctypes.CDLL(None).malloc_trim(0)


def _is_ours() -> bool:
    """Whether malloc is glibc's, and no variable says how it is to work."""
    named = any(name.startswith("MALLOC_") for name in os.environ)
    return platform.libc_ver()[0] == "glibc" and not named


@contextmanager
def giving_memory_back() -> Iterator[None]:
    """While large tensors of many sizes come and go: each has pages of its own, and returns them.

    In the heap they would leave holes, and what is made in these would keep the next ones out.
    """
    if not _keeps:
        yield
        return
    _set((_MMAP_THRESHOLD, 2**20), (_MMAP_MAX, 2**16))
    try:
        yield
    finally:
        _set((_MMAP_MAX, 0))


def _set(*values: tuple[int, int]) -> bool:
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) == 1 for option, value in values)
