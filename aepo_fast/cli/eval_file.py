"""The file of an evaluation: its figures, how it was made, and what was found of each problem."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from aepo_fast.config.errors import ConfigError
from aepo_fast.training.eval_statistics import ProblemResult
from aepo_fast.training.evaluate import EvalResult

_FORMAT = "aepo_fast.evaluation.1"


def check_output(path: Path) -> None:
    """Raise ConfigError where a result cannot be written to a new file."""
    reason, fix = "", "Name another file"
    if path.exists():
        reason = "is there already"
    elif not path.absolute().parent.is_dir():
        reason, fix = "its folder does not exist", "Make the folder, or name another"
    if reason:
        raise ConfigError("--output", str(path), reason, fix)


def write_evaluation(path: Path, result: EvalResult) -> None:
    """Write a result as JSON; an infinite bound of an interval is null.

    Raises ConfigError where the disk refuses.
    """
    values = {"format": _FORMAT, **dataclasses.asdict(result)}
    try:
        path.write_text(json.dumps(_finite(values), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError("--output", str(path), str(error), "Name another file") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and abs(value) == float("inf") else value


def read_evaluation(path: Path) -> tuple[tuple[ProblemResult, ...], dict[str, Any]]:
    """The problems of a written result and its settings; raises ConfigError for any other file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != _FORMAT:
            raise ValueError(f"its format is {values['format']!r}")
        settings = dict(values["settings"])
        problems = tuple(_problem(**one) for one in values["problems"])
        if len({problem.id for problem in problems}) != len(problems):
            raise ValueError("it holds a problem twice")
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"is no result of an evaluation: {type(error).__name__}: {error}"
        fix = "Name a file that aepo-fast eval --output wrote, or a model"
        raise ConfigError("--compare", str(path), reason, fix) from error
    return problems, settings


def _problem(*, id: str, samples: int, correct: int, reward: float) -> ProblemResult:
    counts = isinstance(samples, int) and isinstance(correct, int) and 0 <= correct <= samples
    if not (isinstance(id, str) and counts and samples and isinstance(reward, int | float)):
        raise ValueError(f"a problem has {correct!r} of {samples!r} samples and reward {reward!r}")
    return ProblemResult(id, samples, correct, float(reward))
