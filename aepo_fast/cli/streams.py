"""Standard input and output as they are found: closed, of a small alphabet, or gone midway."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Any


def open_closed_streams() -> None:
    """Put the null device where a standard stream is closed, before a file gets its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def show_every_character() -> None:
    """Write what the terminal's encoding lacks as an escape, e.g. \\u6570, and never fail at it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def quiet_torchao() -> None:
    """Keep what torchao says when it is imported, as transformers does, from standard error.

    It names its CUDA libraries that a CPU build of torch cannot load, and a newer way of torch.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def outlive_the_terminal() -> None:
    """From here on a terminal or pipe that goes away ends the output and not the process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue  # someone else's, e.g. a test's
        stream.flush()
        raw = io.BufferedWriter(_Lasting(stream.fileno(), "w", closefd=False))
        # Python's own standard error keeps nothing back, by means that a new stream has not.
        lines = stream.line_buffering or name == "stderr"
        lasting = io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=lines)
        setattr(sys, name, lasting)
        setattr(sys, f"__{name}__", lasting)


class _Lasting(io.FileIO):
    """A stream that goes on to the null device after its first failure."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)
