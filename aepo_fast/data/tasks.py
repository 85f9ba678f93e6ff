"""reasoning-gym tasks: questions by name and parameters, and their own verifiers."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from typing import Any

import reasoning_gym
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from aepo_fast.config.data import SourceConfig
from aepo_fast.config.errors import ConfigError
from aepo_fast.rewards.final_answer import final_answer

_OPERAND = re.compile(r"\d+(?:\.\d+)?")
# reasoning-gym gives partial credit; below this a final answer is wrong.
CORRECT = 0.99
# Questions that do not say how the verifier wants the answer written.
_GRID = "Answer with the rows of the {}, one a line, its numbers separated by single spaces."
_FORM = {
    "binary_matrix": _GRID.format("matrix"),
    "kakurasu": _GRID.format("completed grid"),
    "list_functions": "Write the list like this: [1, 2, 3]",
    "manipulate_matrix": _GRID.format("resulting matrix"),
    "survo": _GRID.format("completed matrix"),
}


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
    """Draw `source.size` questions: rows with prompt, question, answer and metadata.

    A prompt is the question and, where that leaves the form of the answer open, how to write it.
    """
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
    form = _FORM.get(source.name)
    return [
        {
            "prompt": f"{entry['question'].rstrip()}\n\n{form}" if form else entry["question"],
            **entry,
        }
        for entry in entries
    ]


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


def score_task(verifier: ProceduralDataset, entry: dict[str, Any], text: str) -> float:
    """1.0 if the task's verifier accepts the completion's final answer, else 0.0.

    A verifier that raises on the answer does not accept it; only MemoryError is raised again.
    """
    gold = entry["answer"]
    gold = None if gold is None else str(gold)
    if "target_base" in entry.get("metadata", {}):  # 45 is no part of 45a there
        digits = re.findall(r"(?<!\w)-?(?=[a-z]*\d)[0-9a-z]+\b", final_answer(text, "a") or "")
        answer = digits[-1] if digits else final_answer(text, "a")
    else:
        answer = final_answer(text, gold)
    # The verifier of game_of_life_halting takes bool("False"), which is True.
    if gold in ("True", "False") and (answer or "").lower() != gold.lower():
        return 0.0
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
