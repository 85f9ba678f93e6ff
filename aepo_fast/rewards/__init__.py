"""From completions to rewards: task verifiers, math answers, the user's own functions."""

from __future__ import annotations

from typing import Any

_PUBLIC = ("RewardError", "build_reward", "gold_answer")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:  # only then: it imports torch, which a verifier's process does without
        from aepo_fast.rewards import reward

        return getattr(reward, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
