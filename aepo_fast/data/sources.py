"""Rows of a source of prompts: a reasoning-gym task, a file or a hub dataset."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import load_dataset

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import SourceConfig
from aepo_fast.data.tasks import load_task, nearest


def read_source(
    source: SourceConfig, seed: int, required_columns: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows of one source, each with a column "prompt".

    Raises ConfigError where a row lacks one of the required columns. Of a task the answer may be
    None, as some verifiers look at the question alone.
    """
    if source.kind == "reasoning_gym":
        rows, prompt_column = load_task(source, seed), "prompt"
    else:
        rows = read_file(source.name) if source.kind == "file" else read_hub(source)
        prompt_column = source.prompt_column
    if not rows:
        raise ConfigError("data.sources.name", source.name, "has no rows", "Name another source")
    optional = {"answer"} if source.kind == "reasoning_gym" else set()
    for column in (prompt_column, *(name for name in required_columns if name not in optional)):
        missing = next((index for index, row in enumerate(rows) if row.get(column) is None), None)
        if missing is None:
            continue
        key = "data.sources.prompt_column" if column == prompt_column else "reward.function"
        reason = f"row {missing} (from 0) of {source.name!r} has no column {column!r}"
        fix = nearest(column, rows[missing])
        if column in rows[missing]:
            reason = f"row {missing} (from 0) of {source.name!r} holds nothing in column {column!r}"
            fix = "Drop such rows from the source, or name another column"
        raise ConfigError(key, column, reason, fix)
    if prompt_column != "prompt":
        rows = [{**row, "prompt": row[prompt_column]} for row in rows]
    return rows


def read_file(name: str) -> list[dict[str, Any]]:
    """The rows of a .jsonl, .json or .parquet file."""
    key, path = "data.sources.name", Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(key, name, "there is no such file", "Check the path")
    if path.suffix == ".parquet":
        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowException as error:
            raise ConfigError(key, name, f"is no parquet: {error}", "Write it anew") from error
    if path.suffix not in (".json", ".jsonl"):
        reason = f"files of type {path.suffix!r} are not read"
        raise ConfigError(key, name, reason, "Use .jsonl, .json or .parquet")
    # Not by `datasets`: its columns have one type, and answers are numbers here and LaTeX there.
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if path.suffix == ".json" else _json_lines(text)
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno} is not JSON: {error.msg}"
        raise ConfigError(key, name, reason, "Correct the file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(key, name, f"is not UTF-8: {error}", "Save it as UTF-8") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        reason = "does not hold one JSON object per row"
        raise ConfigError(key, name, reason, "Use a list of objects, or one object a line")
    return rows


def _json_lines(text: str) -> list[Any]:
    rows = []
    # Only "\n" ends a line here: strings may hold what splitlines() also takes for an end.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                error.lineno = number
                raise
    return rows


def read_hub(source: SourceConfig) -> list[dict[str, Any]]:
    """The rows of a dataset on the hub."""
    try:
        dataset = load_dataset(source.name, source.subset or None, split=source.split)
    except Exception as error:  # a wrong name, no connection, a proxy that httpx cannot use
        reason = "the hub did not give this dataset: " + str(error).split("\n")[0]
        fix = "Check name, subset, split and the connection"
        raise ConfigError("data.sources.name", source.name, reason, fix) from error
    return [dict(row) for row in dataset]  # type: ignore[call-overload]
