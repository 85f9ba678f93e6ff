"""Ends common operations that threads of this process wait in.

gloo cannot be told to end one. But its operations fail at once when the connections of their group
close, so what a group opens is noted when it is made. NCCL has an abort.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

_DESCRIPTORS = "/proc/self/fd"  # Linux has it; elsewhere nothing is noted
_noted: set[tuple[str, str]] = set()  # descriptors and what they were, e.g. ("7", "socket:[4242]")


@contextmanager
def noting_connections() -> Iterator[None]:
    """Note what is opened by the process groups that are made while it is open."""
    before = _sockets()
    yield
    _noted.update(_sockets() - before)


def break_connections(store_port: int) -> None:
    """End what all process groups of this process wait for, with an error in each thread.

    The groups are of no use then. store_port: that of torch's store, whose connections stay.
    """
    for number, _ in _noted & _sockets():
        with suppress(OSError), socket.socket(fileno=os.dup(int(number))) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            ports = connection.getsockname()[1], connection.getpeername()[1]
            if store_port not in ports:
                connection.shutdown(socket.SHUT_RDWR)
    _noted.clear()
    if torch.cuda.is_initialized():  # beside the caller, who goes on if it does not end
        threading.Thread(target=_abort_nccl, name="abort", daemon=True).start()


def _sockets() -> set[tuple[str, str]]:
    found = set[tuple[str, str]]()
    with suppress(OSError):
        for number in os.listdir(_DESCRIPTORS):
            with suppress(OSError):  # closed since, as that of the list itself
                found.add((number, os.readlink(f"{_DESCRIPTORS}/{number}")))
    return {(number, name) for number, name in found if name.startswith("socket:")}


def _abort_nccl() -> None:
    from torch.distributed.distributed_c10d import _world  # pyright: ignore[reportPrivateUsage]

    for group in list(_world.pg_map):  # gloo takes no notice
        group.abort()
