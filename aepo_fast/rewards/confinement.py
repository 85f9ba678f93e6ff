"""What a verifier's process may no longer do: it reads a model's text, and some evaluate it.

Linux has Landlock for this from 5.13 on: https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

_CREATE_RULESET, _RESTRICT_SELF = 444, 446  # system calls, by the same numbers everywhere
_VERSION = 1  # a flag: give the version of the interface in place of a set of rules
_NO_NEW_PRIVS = 38  # prctl: no program that is started gets more rights, which Landlock asks for

# Bits of the kernel's landlock.h by the version that has them first. Files: write, remove, make of
# any kind; link or move; truncate. All else, reading and running, stays allowed.
_FILES = {1: 0b1_1111_1111_0010, 2: 1 << 13, 3: 1 << 14}
_NETWORK = {4: 0b11}  # listen and connect by TCP
_SCOPE = {6: 0b11}  # abstract sockets, and signals to processes outside


def version() -> int:
    """The version of Landlock that the kernel has on; 0 where it has none."""
    if sys.platform != "linux":
        return 0
    return max(0, _libc().syscall(_CREATE_RULESET, None, 0, _VERSION))


def confine() -> bool:
    """Let this thread and what it starts write no file, use no TCP and signal nobody outside.

    Files that are open already stay so. Returns False, and changes nothing, without Landlock.
    """
    known = version()
    if not known:
        return False
    masks = [_sum(bits, known) for bits in (_FILES, _NETWORK, _SCOPE)]
    rules = struct.pack("=3Q", *masks)[: 8 * (1 + (known >= 4) + (known >= 6))]
    libc = _libc()
    ruleset = libc.syscall(_CREATE_RULESET, rules, len(rules), 0)
    if ruleset < 0 or libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    done = libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return done


def _sum(bits: dict[int, int], known: int) -> int:
    return sum(mask for first, mask in bits.items() if first <= known)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
