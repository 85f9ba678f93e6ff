"""Errors that nobody foresaw: one line that says what was being done, the traceback in a file."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aepo_fast.report.phase import phase

TRACEBACK_NAME = "traceback.txt"
_WHILE = "while "
SAID = "rank 0 says it"  # a note at an error that all processes of a run have


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say of an error that it came while `what`, e.g. "loading the model"."""
    try:
        with phase(what):
            yield
    except Exception as error:
        error.add_note(_WHILE + what)
        raise


def describe(error: BaseException, command: str, folder: Path | None) -> str:
    """One line about an unexpected error, whose traceback is saved: in `folder` if it can be.

    command: what was being done where no `doing` says it better.
    """
    notes = [note for note in getattr(error, "__notes__", ()) if isinstance(note, str)]
    said = [note for note in notes if note.startswith(_WHILE)] or [_WHILE + command]
    words = first_line(error)
    parts = [f"{said[0]}: {type(error).__name__}{': ' if words else ''}{words}"]
    parts += [note for note in notes if not note.startswith(_WHILE) and "\n" not in note]
    text = "".join(traceback.format_exception(error))
    saved = _save(text, folder)
    parts.append(f"The traceback is in {saved}" if saved else "The traceback cannot be saved")
    return ". ".join(part.rstrip(".") for part in parts) + "."


def first_line(error: BaseException) -> str:
    """What an error says first, at most 300 characters of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""


def out_of_memory(error: BaseException) -> str:
    """What a run says where memory ran out: which settings need less."""
    fix = "lower trainer.tokens_per_microbatch or rollout.batch_rows"
    return f"{first_line(error).rstrip('.')}: {fix}"


def _save(text: str, folder: Path | None) -> Path | None:
    """Write to the folder if there is one, else to a folder of its own; None where neither can."""
    data = text.encode("utf-8", "backslashreplace")
    for place in (folder, None):
        try:
            place = place or Path(tempfile.mkdtemp(prefix="aepo-fast-"))
            if not place.is_dir():
                continue
            path = place / TRACEBACK_NAME
            path.write_bytes(data)
            return path
        except OSError:  # read-only, or full
            continue
    return None
