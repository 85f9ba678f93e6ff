"""How well an entropy was held: figures of a run's series; and parts put into groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from aepo_fast.report.moving_mean import SMOOTHED_STEPS, MovingMean

Part = dict[str, Any]  # a finished run's record


def grouped(parts: Iterable[Part], key: Callable[[Part], Any]) -> dict[Any, list[Part]]:
    """The parts that share a key, in the order of their first."""
    found: dict[Any, list[Part]] = {}
    for part in parts:
        found.setdefault(key(part), []).append(part)
    return found


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

    early: above it, and never yet inside. idle: above it with T at 1 in all their steps, where the
    lever is at rest and GRPO alone could lower the entropy. above, below: all others.
    """

    early: int
    idle: int
    above: int
    below: int


def misses(
    entropy: Sequence[float], temperature: Sequence[float], target: float, share: float
) -> Misses:
    """Count the means further from the target than a share of it."""
    means, counts = trailing_means(entropy), dict.fromkeys(Misses._fields, 0)
    arrived = False
    for step, mean in enumerate(means):
        arrived |= mean <= (1 + share) * target
        if step < len(means) // 2 or abs(mean - target) <= share * target:
            continue
        at_rest = max(temperature[max(0, step + 1 - SMOOTHED_STEPS) : step + 1]) <= 1
        above = "early" if not arrived else "idle" if at_rest else "above"
        counts[above if mean > target else "below"] += 1
    return Misses(**counts)
