"""What a run leaves behind: a record a step, and models to evaluate once it is over."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.e2e.phases import PhaseClock


class Recorder:
    """Records steps, and saves the model after every `every`-th and the last of `steps`.

    Saving takes no time of the run's clock: `wall` is the sum of the steps' seconds.
    """

    def __init__(self, folder: Path, *, steps: int, every: int) -> None:
        self.folder, self.last, self.every = folder, steps, every
        self.clock = PhaseClock()
        self.wall = 0.0
        self.steps: list[dict[str, Any]] = []
        self.saved: list[dict[str, Any]] = []

    def end_step(self, save: Callable[[Path], object], **known: Any) -> None:
        """End a step of the clock; save(folder) writes the model. known: goes into the record."""
        phases = self.clock.stop()
        seconds = sum(phases.values())
        self.wall += seconds
        rounded = {phase: round(value, 4) for phase, value in phases.items()}
        self.steps.append({"seconds": round(seconds, 4), "phases": rounded, **known})
        number = len(self.steps)
        if number == self.last or (self.every and number % self.every == 0):
            folder = self.folder / f"step_{number}"
            save(folder)
            wall = round(self.wall, 3)
            self.saved.append({"step": number, "wall_s": wall, "folder": str(folder)})

    def record(self) -> dict[str, Any]:
        """Steps, saved models, and the most memory that the process and the GPU took so far."""
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found: dict[str, Any] = {
            "steps": self.steps,
            "saved": self.saved,
            "peak_bytes": kib if sys.platform == "darwin" else 1024 * kib,
            "peak_gpu_bytes": None,
        }
        if torch.cuda.is_initialized():
            found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        return found
