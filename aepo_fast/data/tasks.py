"""reasoning-gym tasks: questions by name and parameters, and their own verifiers."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import reasoning_gym
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from aepo_fast.config.errors import ConfigError

if TYPE_CHECKING:  # it imports torch, which a verifier's process does without
    from aepo_fast.config.sections import SourceConfig

# A minus belongs to the number only where no operand stands before it: 7-4 ends in 4.
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-\u2212])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+|/\d+)?"
)
_ANSWER = re.compile(r"<answer>(.*?)</answer>|\banswer\b(?:\s+is)?\s*[:=]?\s*([^\n]+)", re.I | re.S)
_OPERAND = re.compile(r"\d+(?:\.\d+)?")
# reasoning-gym gives partial credit; below this a final answer is wrong.
CORRECT = 0.99


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the closest of some names."""
    found = difflib.get_close_matches(name, list(names), n=3, cutoff=0.3)
    return f"Did you mean {' or '.join(found)}" if found else f"Known: {', '.join(sorted(names))}"


def check_task(source: SourceConfig) -> None:
    """Raise ConfigError for an unknown task or parameter, with the nearest names."""
    key = "data.sources.name"
    if source.name not in DATASETS:
        reason = "reasoning-gym has no task of this name"
        raise ConfigError(key, source.name, reason, nearest(source.name, DATASETS))
    fields = {field.name for field in dataclasses.fields(DATASETS[source.name][1])}
    for param, value in source.params.items():
        key = f"data.sources.params.{param}"
        if param in ("size", "seed"):
            reason = "is not a parameter of the task here"
            raise ConfigError(key, value, reason, "Set size in [[data.sources]], seed in [data]")
        if param not in fields:
            reason = f"the task {source.name!r} has no such parameter"
            raise ConfigError(key, value, reason, nearest(param, fields - {"size", "seed"}))


def load_task(source: SourceConfig, seed: int) -> list[dict[str, Any]]:
    """Draw `source.size` questions: rows with prompt, question, answer and metadata."""
    check_task(source)
    try:
        dataset = reasoning_gym.create_dataset(
            source.name, size=source.size, seed=seed, **source.params
        )
        entries = [dataset[index] for index in range(source.size)]
    except (AssertionError, TypeError, ValueError) as error:
        reason = f"the task {source.name!r} refuses its parameters: {error}"
        fix = "Correct data.sources.params"
        raise ConfigError("data.sources.params", source.params, reason, fix) from error
    return [{"prompt": entry["question"], **entry} for entry in entries]


def task_key(task: str, row: dict[str, Any]) -> str:
    """What a question has in common with its like: the task and its operands in any order.

    3 * 8 and 8 * 3 share a key, and so do 3 + 8 and 8 - 3 within a task, so a hold-out by key never
    tests what training has seen with its operands swapped. Questions without operands in their
    metadata are their own key.
    """
    metadata = row["metadata"]
    expression, numbers = metadata.get("expression"), metadata.get("numbers")
    operands: list[str] = []
    if isinstance(expression, str):
        operands = _OPERAND.findall(expression)
    elif isinstance(numbers, list):
        operands = [str(number) for number in numbers]
    return f"{task}: {' '.join(sorted(operands) or [row['question']])}"


def last_number(text: str) -> str | None:
    """The last number in a text, without thousands separators, or None."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "").replace("\u2212", "-") if found else None


def final_answer(text: str, gold: str) -> str | None:
    """The answer a completion ends with, in the form of the right answer `gold`.

    A number where `gold` is one: the last in the text. Otherwise what follows the last "answer",
    or the last line; None if there is nothing.
    """
    if _NUMBER.fullmatch(gold.strip()):
        return last_number(text)
    matches = _ANSWER.findall(text)
    if matches:
        return (matches[-1][0] or matches[-1][1]).strip() or None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


def score_task(verifier: ProceduralDataset, entry: dict[str, Any], text: str) -> float:
    """1.0 if the task's verifier accepts the completion's final answer, else 0.0.

    A verifier that raises on the answer does not accept it; only MemoryError is raised again.
    """
    answer = final_answer(text, str(entry["answer"]))
    try:
        return float(verifier.score_answer(answer, entry) >= CORRECT)
    except MemoryError:
        raise
    except Exception:  # of a parser fed with anything
        return 0.0


def task_verifier(source: SourceConfig) -> ProceduralDataset:
    """What `score_task` needs of a task."""
    check_task(source)
    return reasoning_gym.create_dataset(source.name, size=1, seed=0, **source.params)
