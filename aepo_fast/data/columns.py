"""Which columns of a source hold the question and the right answer, and what an answer is.

Published datasets name them in a few ways. Where the default name is not there, the ones below are
looked for; what is found is said, and two that disagree are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aepo_fast.config.data import DataConfig, SourceConfig
from aepo_fast.config.errors import ConfigError
from aepo_fast.data.tasks import nearest
from aepo_fast.rewards.final_answer import boxed

_PROMPTS = ("problem", "question", "query")
_ANSWERS = ("reward_model.ground_truth", "ground_truth", "expected_answer", "final_answer")
_SOLUTION = "solution"
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s*([^\s{}$]+)")  # \boxed 5


class UnusableRow(ValueError):
    """A row that cannot be trained on; the message goes on from "row 7 of 'a.jsonl'"."""


@dataclass(frozen=True)
class Columns:
    """Where the rows of a source hold what is read of them, each name nested by dots.

    prompt: columns that hold the question, the first is taken and the others agree with it.
    answer: the same for the right answer, empty where the reward reads none or the source is a
    task. required: other columns that the reward reads.
    """

    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    required: tuple[str, ...]

    def note(self, source: SourceConfig, cfg: DataConfig) -> str:
        """What was found under another name than the configured one; empty where nothing was."""
        found = []
        if self.prompt[0] != source.prompt_column:
            found.append(f"questions from its column {self.prompt[0]!r}")
        if self.answer and self.answer[0] != answer_column(source, cfg):
            found.append(f"answers from its column {self.answer[0]!r}")
        return f"{source.name}: {', '.join(found)}" if found else ""

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its question as "prompt" and, where it is read, its answer as "answer".

        Raises UnusableRow where the row lacks one, and ConfigError where two columns disagree.
        """
        prompt = self._agreed(row, self.prompt, "data.sources.prompt_column")
        values: dict[str, Any] = {"prompt": prompt}
        if self.answer:
            values["answer"] = self._agreed(row, self.answer, "data.answer_column")
        for column in self.required:
            _present(row, column)
        same = all(row.get(name) is value for name, value in values.items())
        return row if same else {**row, **values}

    @staticmethod
    def _agreed(row: dict[str, Any], columns: tuple[str, ...], key: str) -> Any:
        values = [_value(row, column, key) for column in columns]
        for column, value in zip(columns[1:], values[1:], strict=True):
            if str(value).strip() != str(values[0]).strip():
                raise ConfigError(
                    key,
                    columns[0],
                    f"the columns {columns[0]!r} and {column!r} disagree, "
                    f"{values[0]!r:.60} and {value!r:.60}",
                    f"Set it to the one that is meant, {columns[0]!r} or {column!r}",
                )
        return values[0]


def answer_column(source: SourceConfig, cfg: DataConfig) -> str:
    """The configured column of a source's right answers."""
    return source.answer_column or cfg.answer_column


def find_columns(
    source: SourceConfig, cfg: DataConfig, required: Sequence[str], row: dict[str, Any]
) -> Columns:
    """The columns to read of a source, by its first row; raises ConfigError for missing ones."""
    others = tuple(name for name in required if name != "answer")
    if source.kind == "reasoning_gym":  # a task may have no one right answer
        return Columns(("prompt",), (), tuple(required) if "answer" not in row else others)
    prompt = _known(row, source.prompt_column, SourceConfig.prompt_column, _PROMPTS)
    if not prompt:
        raise _missing("data.sources.prompt_column", source, source.prompt_column, row)
    answer: tuple[str, ...] = ()
    wanted = answer_column(source, cfg)
    if "answer" in required or wanted != DataConfig.answer_column:
        answer = _known(row, wanted, DataConfig.answer_column, (*_ANSWERS, _SOLUTION))
        if not answer:
            key = "reward.function" if wanted == "answer" else "data.answer_column"
            raise _missing(key, source, wanted, row)
    for name in others:
        if name not in row:
            raise _missing("reward.function", source, name, row)
    return Columns(prompt, answer, others)


def _known(
    row: dict[str, Any], column: str, default: str, others: Sequence[str]
) -> tuple[str, ...]:
    """The configured column, or where the default one is not there, all of the usual ones."""
    if has(row, column):
        return (column,)
    if column != default:
        return ()
    found = [spelling for name in (default, *others) for spelling in _spellings(row, name)]
    solutions = [name for name in found if name.lower() == _SOLUTION]
    for name in solutions:
        # Prose without a box stands for an answer only where nothing else does.
        with_box = isinstance(row[name], str) and (boxed(row[name]) or _BARE_BOX.search(row[name]))
        if not isinstance(row[name], str) or (not with_box and len(found) > 1):
            found.remove(name)
    return tuple(found)


def _spellings(row: dict[str, Any], name: str) -> list[str]:
    """Columns that have a name but for its capitals."""
    if "." in name:
        return [name] if has(row, name) else []
    return [column for column in row if str(column).lower() == name]


def _missing(key: str, source: SourceConfig, column: str, row: dict[str, Any]) -> ConfigError:
    reason = f"row 0 (from 0) of {source.name!r} has no column {column!r}"
    return ConfigError(key, column, reason, nearest(column, list(map(str, row))))


_ABSENT = object()


def _lookup(row: dict[str, Any], column: str) -> Any:
    """The value under a name nested by dots, `_ABSENT` without one; positions in lists count."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _ABSENT
    return value


def has(row: dict[str, Any], column: str) -> bool:
    """Whether a row has a column, its name nested by dots."""
    return _lookup(row, column) is not _ABSENT


def _present(row: dict[str, Any], column: str) -> Any:
    value = _lookup(row, column)
    if value is _ABSENT:
        raise UnusableRow(f"has no column {column!r}")
    if value is None:
        raise UnusableRow(f"holds nothing in column {column!r}")
    return value


def _value(row: dict[str, Any], column: str, key: str) -> Any:
    """A question or, with its key, a right answer."""
    value = _present(row, column)
    if key != "data.answer_column":
        return value
    if isinstance(value, str | list | dict) and not (str(value).strip() and value):
        raise UnusableRow(f"holds an empty answer in column {column!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UnusableRow(f"holds {value} in column {column!r}, which is no answer")
    if isinstance(value, str):
        check_text(value, f"the answer in column {column!r}")
        if column != "answer":  # which a reward may want whole
            return _last_boxed(value, column)
    return value


def check_text(text: str, what: str) -> None:
    """Raise UnusableRow for a text with half a character, which no tokenizer and no file takes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            reason = f"has half a character, {text[error.start]!r}, in {what}"
            raise UnusableRow(reason) from error


def _last_boxed(text: str, column: str) -> str:
    r"""What the last complete \boxed{...} of a solution holds; a text without one as it is.

    Raises UnusableRow for a solution of several words without a box.
    """
    span, bare = boxed(text), list(_BARE_BOX.finditer(text))
    if bare and (span is None or bare[-1].start() > span[0]):
        return bare[-1][1]
    if span is not None:
        return text[slice(*span)].strip()
    if column.lower().rsplit(".", 1)[-1] == _SOLUTION and len(text.split()) > 1:
        if "####" in text:
            return text
        raise UnusableRow(rf"has no \boxed answer in column {column!r}")
    return text
