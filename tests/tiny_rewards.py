"""Rewards of tiny runs. They import little, as every run's reward process imports this module."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def even_start(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that the tiny model can earn: 1 for an even first token."""
    return [float(bool(ids) and ids[0] % 2 == 0) for ids in completion_ids]


def broken_on_the_third(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Fails on the third sample of a call, and only there."""
    values = [float(ids[0] % 2) for ids in completion_ids]
    values[2] = float("nan")
    return values


def silent(completion_ids: list[list[int]], **columns: Any) -> list[None]:
    """Applies to no sample."""
    return [None] * len(completion_ids)


def none_for_the_first_prompt(
    completion_ids: list[list[int]], **columns: Any
) -> list[float | None]:
    """Of the first prompt's samples has none a reward, of the others every second one 1."""
    return [None if i < 4 else float(i % 2) for i in range(len(completion_ids))]


def hanging(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Never returns, and says in the working directory that it has begun."""
    Path("begun").touch()
    return [9**9**9**9]


_calls = 0


def failing_third_call(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Fails from its third call on, while the working directory has a file "no_judge"."""
    global _calls
    _calls += 1
    if _calls > 2 and Path("no_judge").exists():
        raise ValueError("the judge is gone")
    return [float(ids[0] % 2) for ids in completion_ids]


def fails_on_rank_1(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Fails in the second process of a run from the third step on, of 2 groups of 4 a step."""
    global _calls
    _calls += len(completion_ids)
    if _calls > 20 and os.environ.get("RANK") == "1":
        raise ValueError("the judge of rank 1 is gone")
    return even_start(completion_ids)
