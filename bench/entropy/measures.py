"""How well an entropy was held: figures of a run's series; and parts put into groups."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from aepo_fast.report.moving_mean import MovingMean

Part = dict[str, Any]  # a finished run's record


def grouped(parts: Iterable[Part], key: Callable[[Part], Any]) -> dict[Any, list[Part]]:
    """The parts that share a key, in the order of their first."""
    found: dict[Any, list[Part]] = {}
    for part in parts:
        found.setdefault(key(part), []).append(part)
    return found


def by_setting(parts: Iterable[Part]) -> dict[tuple[str, float | None], list[Part]]:
    """The seeds of each setting and target."""
    return grouped(parts, lambda part: (part["setting"], part["target"]))


def trailing_means(values: Sequence[float]) -> list[float]:
    """`entropy_smoothed` of a series: a single step's samples jitter too much to judge by."""
    mean = MovingMean()
    return [mean.update(value) for value in values]


def last_half(values: Sequence[float]) -> Sequence[float]:
    """The later half of a series."""
    return values[len(values) // 2 :]


def late_mean(values: Sequence[float]) -> float:
    """The mean over the last half of the steps."""
    half = last_half(values)
    return sum(half) / len(half)


def late(part: Part) -> tuple[float, float]:
    """Entropy and reward of a run, means over the last sixth of its steps.

    A step samples before it learns. So the rewards of many steps say more of a method's accuracy
    than the samples of the last policy, which a constant learning rate throws to and fro.
    """
    entropy, reward = part["entropy"], part["reward"]
    first = len(reward) * 5 // 6
    return statistics.fmean(entropy[first:]), statistics.fmean(reward[first:])


def held_within(entropy: Sequence[float], target: float) -> dict[str, float]:
    """Distances to the target over the last half of the steps, as shares of the target.

    mean, max: of the trailing means. raw: mean over single steps.
    """
    smooth = [abs(value - target) / target for value in last_half(trailing_means(entropy))]
    raw = [abs(value - target) / target for value in last_half(entropy)]
    return {
        "mean": round(sum(smooth) / len(smooth), 4),
        "max": round(max(smooth), 4),
        "raw": round(sum(raw) / len(raw), 4),
    }


class Misses(NamedTuple):
    """Trailing means of the last half that lie outside a band around the target, by their reason.

    early: above it, and never yet inside. above, below: all others.
    """

    early: int
    above: int
    below: int


def misses(entropy: Sequence[float], target: float, share: float) -> Misses:
    """Count the means further from the target than a share of it."""
    means, counts = trailing_means(entropy), dict.fromkeys(Misses._fields, 0)
    arrived = False
    for step, mean in enumerate(means):
        arrived |= mean <= (1 + share) * target
        if step < len(means) // 2 or abs(mean - target) <= share * target:
            continue
        counts["below" if mean < target else "above" if arrived else "early"] += 1
    return Misses(**counts)
