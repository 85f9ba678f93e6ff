"""Seconds by phase of a training step, whichever trainer does it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

ROLLOUT, REWARD, LOGPROBS = "rollout", "reward", "log-probs"
LEARNING, OPTIMIZER, OTHER = "loss and backward", "optimizer", "other"
PHASES: tuple[str, ...] = (ROLLOUT, REWARD, LOGPROBS, LEARNING, OPTIMIZER, OTHER)


class PhaseClock:
    """Charges time to the innermost phase that is open, and else to OTHER; waits for a GPU."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.last = 0.0

    def start(self) -> None:
        """Begin a step."""
        self.open, self.seconds = [OTHER], dict.fromkeys(PHASES, 0.0)
        self.last = _now()

    def stop(self) -> dict[str, float]:
        """End it; seconds by phase, whose sum is the step's."""
        self._charge()
        return dict(self.seconds)

    def enter(self, phase: str) -> None:
        """Open a phase."""
        self._charge()
        self.open.append(phase)

    def leave(self) -> None:
        """Close the innermost phase."""
        self._charge()
        self.open.pop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Open a phase for the time of a context."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def wrap(self, owner: Any, method: str, phase: Callable[[], str]) -> None:
        """Let a method of an object be a phase, whose name is asked for at each call."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def timed(*positional: Any, **named: Any) -> Any:
            with self.phase(phase()):
                return original(*positional, **named)

        setattr(owner, method, timed)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the steps of an optimizer be a phase."""
        optimizer.register_step_pre_hook(lambda *_: self.enter(OPTIMIZER))
        optimizer.register_step_post_hook(lambda *_: self.leave())

    def _charge(self) -> None:
        now = _now()
        if self.open:
            self.seconds[self.open[-1]] += now - self.last
        self.last = now


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
