"""What a verifier's process runs: the tasks' own verifiers and the comparison of math answers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any


def load_verifiers(
    tasks: dict[int, tuple[str, dict[str, Any]]], compares: bool
) -> tuple[Callable[[tuple[int, Any, str]], float], None]:
    """Import what is needed and return the function that scores, which takes (source, right, text).

    tasks: by source, name and parameters of a reasoning-gym task; `right` is a row of it. compares:
    the answers of other sources are compared; `right` is the right answer's text.
    """
    verifiers: dict[int, Any] = {}
    if tasks:
        import reasoning_gym  # not needed where there is no task, and slow to import

        from aepo_fast.data.tasks import score_task

        for source, (name, params) in tasks.items():
            verifiers[source] = reasoning_gym.create_dataset(name, size=1, seed=0, **params)
    if compares:
        from aepo_fast.rewards.math_answers import compare

        logging.getLogger("math_verify").setLevel(logging.ERROR)
        compare("1", "1")  # imports and grammar

    def score(request: tuple[int, Any, str]) -> float:
        source, right, text = request
        if source in verifiers:
            return score_task(verifiers[source], right, text)
        verdict = compare(right, text)
        if verdict is None:
            raise ValueError("the right answer says nothing")
        return float(verdict)

    return score, None
