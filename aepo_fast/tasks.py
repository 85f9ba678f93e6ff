"""The former name of `aepo_fast.data.tasks`."""

from __future__ import annotations

from aepo_fast.data.tasks import (
    CORRECT,
    check_task,
    load_task,
    nearest,
    score_task,
    task_key,
    task_verifier,
)
from aepo_fast.rewards.final_answer import final_answer, last_number

__all__ = [
    "CORRECT",
    "check_task",
    "final_answer",
    "last_number",
    "load_task",
    "nearest",
    "score_task",
    "task_key",
    "task_verifier",
]
