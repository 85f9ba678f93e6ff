"""How well an entropy was held: figures of a run's series."""

from __future__ import annotations

from collections.abc import Sequence

# The entropy of one step's samples jitters by 0.1 nats around the policy's on small batches, so a
# single step says little of what the controller did.
MEAN_STEPS = 5


def trailing_means(values: Sequence[float], width: int = MEAN_STEPS) -> list[float]:
    """The mean of each value and the width - 1 before it, fewer where there are not so many."""
    windows = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def last_half(values: Sequence[float]) -> Sequence[float]:
    """The later half of a series."""
    return values[len(values) // 2 :]


def late_mean(values: Sequence[float]) -> float:
    """The mean over the last half of the steps."""
    half = last_half(values)
    return sum(half) / len(half)


def held_within(entropy: Sequence[float], target: float) -> dict[str, float]:
    """Distances to the target over the last half of the steps, as shares of the target.

    mean, max: of the trailing means of MEAN_STEPS steps. raw: mean over single steps.
    """
    smooth = [abs(value - target) / target for value in last_half(trailing_means(entropy))]
    raw = [abs(value - target) / target for value in last_half(entropy)]
    return {
        "mean": round(sum(smooth) / len(smooth), 4),
        "max": round(max(smooth), 4),
        "raw": round(sum(raw) / len(raw), 4),
    }
