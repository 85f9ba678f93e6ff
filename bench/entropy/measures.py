"""How well an entropy was held: figures of a run's series."""

from __future__ import annotations

from collections.abc import Sequence

from aepo_fast.moving_mean import MovingMean


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
