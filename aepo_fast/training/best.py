"""The best checkpoint of a run by a metric of its evaluations, as its checkpoints record it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


class BestCheckpoint:
    """Which step had the highest value of `checkpoint.keep_best`, and what it was.

    metric: empty where none is kept. state: of the checkpoint that the run goes on from, or None.
    folder: of the run's checkpoints. What the state names is forgotten, and said, where it was by
    another metric or is not in the folder any more.
    """

    def __init__(self, metric: str, state: dict[str, Any] | None, folder: Path) -> None:
        self.metric = metric
        self.value: float | None = None
        self.step: int | None = None
        best = (state or {}).get("best")
        if not metric or best is None:
            return
        checkpoint = folder / f"step_{best['step']}"
        if best["metric"] != metric or not checkpoint.is_dir():
            gone = f"of {best['metric']!r}" if best["metric"] != metric else "not there any more"
            print(f"the best checkpoint so far, {checkpoint}, is {gone}", file=sys.stderr)
            return
        self.value, self.step = best["value"], best["step"]

    def update(self, step: int, metrics: dict[str, Any]) -> bool:
        """Whether a step's metrics hold a new best; of equal ones the first is the best."""
        if not self.metric or (self.value is not None and metrics[self.metric] <= self.value):
            return False
        self.value, self.step = metrics[self.metric], step
        return True

    def state_dict(self) -> dict[str, Any]:
        """What goes into the state of a checkpoint; nothing where none is the best."""
        if self.step is None:
            return {}
        return {"best": {"metric": self.metric, "value": self.value, "step": self.step}}
