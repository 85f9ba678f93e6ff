"""How `aepo-fast eval` samples, checked before anything else is looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aepo_fast.config.errors import ConfigError, require


@dataclass(frozen=True)
class Sampling:
    """How an evaluation samples. temperature: 0 is greedy. ks: of pass@k; empty: powers of two.

    top_k, top_p: see `Request`.
    """

    samples: int
    temperature: float
    top_p: float
    ks: tuple[int, ...]
    top_k: int = 0

    @classmethod
    def of(
        cls,
        samples: int | None = None,
        *,
        k: Sequence[int] = (),
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        greedy: bool = False,
    ) -> Sampling:
        """From options that may be left out: 4 samples at temperature 1, or 1 if greedy.

        Raises ConfigError for values out of range and those that contradict each other.
        """
        if greedy:
            random = (("--temperature", temperature), ("--top-p", top_p), ("--top-k", top_k))
            for name, value in random:
                reason = "says how to draw at random, and --greedy takes the most likely token"
                require(value is None, name, value, reason, "Give one of the two")
            reason = "are all the same with --greedy"
            require(samples in (None, 1), "--samples", samples, reason, "Leave it out")
        number = samples if samples is not None else 1 if greedy else 4
        require(number >= 1, "--samples", number, "is no number of samples", "Set 1 or more")
        heat = 1.0 if temperature is None else temperature
        reason, fix = "is not above 0 and finite", "Set e.g. 0.7, or use --greedy"
        require(0 < heat < math.inf, "--temperature", heat, reason, fix)
        share = 1.0 if top_p is None else top_p
        reason = "is no share of probability above 0 and at most 1"
        require(0 < share <= 1, "--top-p", share, reason, "Set e.g. 0.95")
        reason = "is no number of tokens to draw from"
        require(top_k is None or top_k >= 1, "--top-k", top_k, reason, "Set e.g. 20")
        for one in k:
            reason = f"is no number between 1 and --samples = {number}"
            require(1 <= one <= number, "--k", one, reason, "Raise --samples, or lower it")
        return cls(number, 0.0 if greedy else heat, share, tuple(sorted(set(k))), top_k or 0)


def read_ks(text: str | None) -> tuple[int, ...]:
    """The numbers of a list such as "1,8,32"; none of None."""
    try:
        return () if text is None else tuple(int(part) for part in text.split(","))
    except ValueError as error:
        reason = "is no list of whole numbers"
        raise ConfigError("--k", text, reason, "Write e.g. --k 1,8,32") from error
