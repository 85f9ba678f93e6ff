"""JSON-lines files of a run: appended a line at a time, read past what a crash has damaged."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard


def json_line(values: dict[str, Any]) -> str:
    """One line of a file, with its end."""
    return json.dumps(values, ensure_ascii=False) + "\n"


def append_text(path: Path, text: str) -> None:
    """Append whole lines, or none of them.

    Raises OSError, with the file's name, where the disk is full or refuses.
    """
    data = memoryview(text.encode("utf-8", "backslashreplace"))  # of halves of characters
    with path.open("ab", buffering=0) as file:
        start = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            file.truncate(start)
            raise OSError(error.errno, error.strerror, str(path)) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that are of a step; those that are damaged are counted on stderr.

    The last line may be half written, by a run that was killed or is alive.
    """
    return [line for _, line in _lines_of_steps(path)]


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines of a file up to `step`, and none that is damaged; whole or not at all."""
    if not path.exists():
        return
    draft = path.with_suffix(".tmp")
    try:
        with draft.open("wb") as file:
            for raw, line in _lines_of_steps(path):
                if line["step"] <= step:
                    file.write(raw + b"\n")
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def is_step(line: Any) -> TypeGuard[dict[str, Any]]:
    """Whether the JSON value of a line is what a run writes."""
    return isinstance(line, dict) and isinstance(line.get("step"), int)


def lines_of(path: Path) -> Iterator[Any]:
    """The JSON values of a file's whole lines, whoever wrote them."""
    for text in _whole_lines(path):
        with suppress(ValueError, RecursionError):
            yield json.loads(text)


def _lines_of_steps(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line as it stands in the file, and what it says."""
    damaged = 0
    for text in _whole_lines(path):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if is_step(line):
            yield text, line
        else:
            damaged += 1
    if damaged:
        print(f"{path}: damaged lines left out: {damaged}", file=sys.stderr)


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for raw in file:
            if raw.endswith(b"\n"):
                # A power loss leaves zeros where the file had grown and nothing was written yet.
                yield raw.strip(b"\0\r\n ")
