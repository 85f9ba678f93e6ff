"""Rows of a source of prompts: a reasoning-gym task, files or a hub dataset.

Rows come one after the other: of a large source only those that are used are kept in memory.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import load_dataset

from aepo_fast.config.data import SourceConfig
from aepo_fast.config.errors import ConfigError
from aepo_fast.data.tasks import load_task

_KEY = "data.sources.name"
_TYPES = (".jsonl", ".json", ".parquet")
_READ = "Use .jsonl, .json (or either with .gz) or .parquet"
_BATCH_ROWS = 100_000  # repeats are found within so many rows, in some 80 MB
# Files that lie beside the shards of a dataset and hold none of its rows.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=[-_.]|$)", re.I)


def read_rows(
    source: SourceConfig, seed: int, *, skip_repeats: bool = False
) -> Iterator[dict[str, Any] | None]:
    """The rows of a source as they stand there; raises ConfigError for one that cannot be read.

    skip_repeats: None in the place of a row that repeats the question of one before it, where that
    is cheap to see.
    """
    if source.kind == "reasoning_gym":
        yield from load_task(source, seed)
    elif source.kind == "hub":
        yield from read_hub(source)
    else:
        for path in find_files(source.name):
            yield from read_file(path, unique=source.prompt_column if skip_repeats else None)


def find_files(name: str) -> list[Path]:
    """The files of a source: one, those below a folder, or those that a pattern names, in order.

    Raises ConfigError where there is none, and for a folder with several splits.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        below = sorted(one for one in path.rglob("*") if one.is_file() and not _hidden(one, path))
        files = [one for one in below if _type(one) in _TYPES and one.name not in _METADATA]
        if not files:
            raise ConfigError(_KEY, name, "the folder holds no file of rows", _READ)
        splits = sorted({split for one in files if (split := _split(one, path))})
        if len(splits) > 1:
            reason = f"the folder holds several splits: {', '.join(splits)}"
            first = next(one for one in files if _split(one, path) == splits[-1])
            fix = f"Name the files of one, e.g. by a pattern such as {_pattern(first)}"
            raise ConfigError(_KEY, name, reason, fix)
        return files
    files = [Path(one) for one in sorted(glob.glob(str(path), recursive=True))]
    files = [one for one in files if one.is_file()]
    if not files:
        raise ConfigError(_KEY, name, "there is no such file", "Check the path")
    return files


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)


def _type(path: Path) -> str:
    """The kind of a file by its name, in small letters, without the ".gz" of a compressed one."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _split(path: Path, folder: Path) -> str:
    """The split that the name of a file or of the folder right above it says, if any."""
    for part in reversed(path.relative_to(folder).parts[-2:]):
        if found := _SPLIT.match(part):
            return found[1].lower()
    return ""


def _pattern(path: Path) -> str:
    match = _SPLIT.match(path.name)
    return str(path.parent / f"{match[1]}*" if match else path.parent / "*")


def read_file(path: Path, *, unique: str | None = None) -> Iterator[dict[str, Any] | None]:
    """The rows of a .jsonl, .json or .parquet file; raises ConfigError for one that is damaged.

    unique: a column of whose repeats in a .parquet file only the first has its row.
    """
    name, kind = str(path), _type(path)
    if kind not in _TYPES:
        raise ConfigError(_KEY, name, f"files of type {path.suffix!r} are not read", _READ)
    try:
        if kind == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(_BATCH_ROWS):
                    yield from _rows_of(batch, unique)
        else:
            # Not by `datasets`, whose columns have one type: answers are numbers here, LaTeX there.
            yield from _json_rows(path, name, whole=kind == ".json")
    except UnicodeDecodeError as error:
        raise ConfigError(_KEY, name, f"is not UTF-8: {error}", "Save it as UTF-8") from error
    except pyarrow.ArrowException as error:
        reason = "is no parquet: " + str(error).split("\n")[0]
        raise ConfigError(_KEY, name, reason, "Write it anew") from error
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, OverflowError) as error:
        # No permission, a damaged .gz, a date that Python has not.
        reason = f"cannot be read: {str(error).splitlines()[0]}"
        raise ConfigError(_KEY, name, reason, "Correct the file") from error


def _rows_of(batch: pyarrow.RecordBatch, unique: str | None) -> Iterator[dict[str, Any] | None]:
    # Published sets repeat each question up to a hundred times, and a row takes 10 us to convert.
    marks = None if unique not in batch.schema.names else _marks(batch.column(unique))
    if marks is None:
        yield from batch.to_pylist()
        return
    firsts = np.sort(np.unique(marks, return_index=True)[1])
    rows = iter(batch.take(pyarrow.array(firsts)).to_pylist())
    is_first = np.isin(np.arange(len(marks)), firsts)
    yield from (next(rows) if first else None for first in is_first.tolist())


def _marks(column: pyarrow.Array) -> np.ndarray | None:
    """A number for each question, equal where questions are: int64 [rows].

    Of strings and of chats of a single message; None for all other columns.
    """
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        codes = column.dictionary_encode().indices
        return codes.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    lengths = column.value_lengths() if pyarrow.types.is_list(column.type) else None
    if lengths is None or lengths.null_count or lengths.unique().to_pylist() != [1]:
        return None
    message = column.flatten()
    if not pyarrow.types.is_struct(message.type) or message.null_count:
        return None
    total = np.zeros(len(column), np.int64)
    for part in message.flatten():
        codes = _marks(part)
        if codes is None:
            return None
        total = np.unique(total * (len(codes) + 1) + codes + 1, return_inverse=True)[1]
    return total


def _json_rows(path: Path, name: str, *, whole: bool) -> Iterator[dict[str, Any]]:
    with path.open("rb") as raw:
        plain: Any = gzip.open(raw) if path.suffix.lower() == ".gz" else raw
        # A mark of UTF-8 at the start is none of the text. Only "\n" ends a line: strings may hold
        # what splitlines() also takes for an end.
        text = io.TextIOWrapper(plain, encoding="utf-8-sig", newline="\n")
        for row in _json_list(text.read(), name) if whole else _json_lines(text, name):
            if not isinstance(row, dict):
                reason = "does not hold one JSON object per row"
                fix = "Use a list of objects, or one object a line"
                raise ConfigError(_KEY, name, reason, fix)
            yield row


def _json_list(text: str, name: str) -> Iterable[Any]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):  # one object a line under the other name
            return _json_lines(io.StringIO(text, newline="\n"), name)
        raise _no_json(name, getattr(error, "lineno", 1), error) from error
    return rows if isinstance(rows, list) else [None]


def _json_lines(lines: Iterable[str], name: str) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _no_json(name, number, error) from error
            yield row


def _no_json(name: str, line: int, error: Exception) -> ConfigError:
    reason = f"line {line} is not JSON: {getattr(error, 'msg', error)}"
    return ConfigError(_KEY, name, reason, "Correct the file")


def read_hub(source: SourceConfig) -> Iterator[dict[str, Any]]:
    """The rows of a dataset on the hub."""
    try:
        dataset = load_dataset(source.name, source.subset or None, split=source.split)
    except Exception as error:  # the hub's client and its formats have no error in common
        reason = "the hub did not give this dataset: " + str(error).split("\n")[0]
        fix = "Check name, subset, split and the connection"
        raise ConfigError(_KEY, source.name, reason, fix) from error
    yield from map(dict, dataset)  # type: ignore[arg-type]
