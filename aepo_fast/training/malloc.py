"""Memory that a run on the CPU frees and soon needs again."""

from __future__ import annotations

import ctypes
import os
import platform

# Of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, instead of giving it back and asking for it page by page.

    A step allocates the same large tensors again and again, and on a CPU a fresh page costs more
    than the work on it. Only where malloc is glibc's and no MALLOC_ variable says otherwise;
    returns whether it was done.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Big blocks come from the heap as well, and the heap does not shrink.
    values = (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26)
    return all(mallopt(option, value) == 1 for option, value in values)
