"""The mean of a metric's last values, the same in the log and in the plot."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

SMOOTHED_STEPS = 5


class MovingMean:
    """Mean of the last `SMOOTHED_STEPS` finite values, of fewer while there are no more.

    values: those that an earlier part of the run ended with, as its checkpoint has them.
    """

    def __init__(self, values: Iterable[float] = ()) -> None:
        self._values = deque(values, maxlen=SMOOTHED_STEPS)

    def update(self, value: float | None) -> float:
        """Take in a value and return the mean, NaN before the first; None is a null of the log."""
        if value is not None and math.isfinite(value):
            self._values.append(value)
        return math.fsum(self._values) / len(self._values) if self._values else math.nan

    def values(self) -> list[float]:
        """The values it goes on from, oldest first."""
        return list(self._values)
