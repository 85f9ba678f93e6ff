"""Processes of this machine, as Linux lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

# Where a line of /proc names each, after the name of the process, in brackets.
_FIELDS = {"parent": 1, "session": 3}


def processes_of(kind: Literal["parent", "session"], number: int) -> list[int]:
    """The living processes of a parent, or of a session, in order."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # has just ended
            continue
        if int(fields[_FIELDS[kind]]) == number and fields[0] != "Z":
            found.append(int(path.parent.name))
    return sorted(found)
