"""The former name of `aepo_fast.rewards.math_worker`."""

from __future__ import annotations

from aepo_fast.rewards.math_answers import compare
from aepo_fast.rewards.math_worker import MathWorker, MathWorkerError

__all__ = ["MathWorker", "MathWorkerError", "compare"]
