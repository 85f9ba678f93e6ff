"""A reward under which every group has an advantage, whatever its samples are."""

from __future__ import annotations

from typing import Any


def alternating(completions: list[Any], **columns: Any) -> list[float]:
    """1 for every second completion."""
    return [float(index % 2) for index in range(len(completions))]
