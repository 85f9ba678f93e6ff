"""Simple entropy controllers: from measured entropy to the temperature of AEPO's term.

A controller gives T for the coming step and takes in what each step measured. T = 1 leaves the
entropy alone; that is T until an entropy has been measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from aepo_fast.config.method import AepoConfig


def aepo_draws(num_prompts: int, alpha: float) -> int:
    """Auxiliary prompts of a step: max(1, round(alpha * prompts)), at most all of them."""
    return min(num_prompts, max(1, round(alpha * num_prompts)))


@dataclass(frozen=True)
class Measurement:
    """What a step tells the controller.

    entropy: token mean over main samples before the step's updates, nats; not finite where none
    was measured. stderr: its standard error, nats. temperature: the T that the step's updates
    used. updates: optimizer steps that were taken.
    """

    entropy: float
    stderr: float
    temperature: float
    updates: int


class EntropyController(Protocol):
    """Chooses T so that the policy's entropy goes to aepo.entropy_target."""

    @property
    def entropy(self) -> float | None:
        """The last entropy that was measured, nats."""
        ...

    def temperature(self) -> float:
        """T for the coming step."""
        ...

    def update(self, step: Measurement) -> None:
        """Take in a step; an entropy that is not finite is not a measurement."""
        ...

    def metrics(self) -> dict[str, float]:
        """What the controller knows besides, for the log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, or from that of another controller with its last entropy."""
        ...


class ProportionalController:
    """T = clip(1 + k e + k_i sum(e), T_min, T_max), where e = H0 - H is the last error in nats.

    Without the sum it is the published law of arXiv 2510.08141 v7.
    """

    def __init__(self, cfg: AepoConfig) -> None:
        self.cfg = cfg
        self.entropy: float | None = None
        self.integral = 0.0

    def temperature(self) -> float:
        """T for the coming step."""
        cfg = self.cfg
        if self.entropy is None or not cfg.enabled:
            return 1.0
        return self._answer(cfg.entropy_target - self.entropy)

    def _answer(self, error: float) -> float:
        """T after a step of this error, nats."""
        demand = self._demand(error, self.integral)
        return min(max(demand, self.cfg.temperature_min), self.cfg.temperature_max)

    def _demand(self, error: float, integral: float) -> float:
        return 1 + (self.cfg.gain or 0.0) * error + (self.cfg.integral_gain or 0.0) * integral

    def update(self, step: Measurement) -> None:
        """Take in a step; an entropy that is not finite is not a measurement."""
        cfg = self.cfg
        if not math.isfinite(step.entropy):
            return
        self.entropy = step.entropy
        error = cfg.entropy_target - step.entropy
        # While T is at its limit, errors that push it further out would only wind the sum up.
        demand = self._demand(error, self.integral + error)
        over, under = demand > cfg.temperature_max, demand < cfg.temperature_min
        if not (over and error > 0 or under and error < 0):
            self.integral += error

    def metrics(self) -> dict[str, float]:
        """Nothing: all it knows is logged already."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"entropy": self.entropy, "integral": self.integral}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, or from that of another controller with its last entropy."""
        self.entropy = state["entropy"]
        self.integral = state.get("integral", 0.0)


class SwitchController(ProportionalController):
    """T_max below the target, T_min above it: the law of arXiv 2510.08141 v1 to v6."""

    def _answer(self, error: float) -> float:
        """One of the two."""
        return self.cfg.temperature_max if error > 0 else self.cfg.temperature_min
