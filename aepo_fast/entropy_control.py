"""The entropy controller: from measured entropy to the temperature of AEPO's term."""

from __future__ import annotations

import math
from typing import Any

from aepo_fast.config import AepoConfig

_STATE = ("entropy", "previous", "first", "measured", "integral")


def aepo_draws(num_prompts: int, alpha: float) -> int:
    """Auxiliary prompts of a step: max(1, round(alpha * prompts)), at most all of them."""
    return min(num_prompts, max(1, round(alpha * num_prompts)))


class EntropyController:
    """Chooses T so that the policy's entropy H goes to H0 = cfg.entropy_target.

    switch (arXiv 2510.08141 v1-v6): T_max below the target, T_min above it. proportional (v7):
    T = clip(1 + k (H0 - H'), T_min, T_max); integral_gain adds ki times the sum of the errors, and
    lead_steps looks ahead along the trend, H' = H + lead (H - H_previous), and ramp_steps lets the
    target fall linearly from the first entropy, so that the policy does not arrive at H0 too fast
    to be stopped there. T is 1 until an entropy has been measured.
    """

    def __init__(self, cfg: AepoConfig) -> None:
        self.cfg = cfg
        self.entropy: float | None = None
        self.previous: float | None = None
        self.first: float | None = None
        self.measured = 0
        self.integral = 0.0

    def target(self) -> float:
        """The entropy aimed at now: H0, or on the way to it; NaN before a ramp has its start."""
        aim = self.cfg.entropy_target
        if self.measured >= self.cfg.ramp_steps:
            return aim
        if self.first is None:
            return math.nan
        return aim + (self.first - aim) * (1 - self.measured / self.cfg.ramp_steps)

    def error(self) -> float:
        """Target - H', in nats; 0 until an entropy has been measured."""
        if self.entropy is None:
            return 0.0
        trend = 0.0 if self.previous is None else self.entropy - self.previous
        return self.target() - (self.entropy + self.cfg.lead_steps * trend)

    def temperature(self) -> float:
        """T for the coming step."""
        cfg = self.cfg
        if self.entropy is None or not cfg.enabled:
            return 1.0
        if cfg.controller == "switch":
            below = self.entropy < self.target()
            return cfg.temperature_max if below else cfg.temperature_min
        return min(max(self._demand(), cfg.temperature_min), cfg.temperature_max)

    def _demand(self) -> float:
        return 1 + self.cfg.gain * self.error() + self.cfg.integral_gain * self.integral

    def update(self, entropy: float) -> None:
        """Take in the entropy of a step, in nats per token, measured over main rows.

        One that is not finite, as of a step that was skipped, is not a measurement: T stays.
        """
        if not math.isfinite(entropy):
            return
        self.previous, self.entropy = self.entropy, entropy
        self.first = entropy if self.first is None else self.first
        self.measured += 1
        error = self.error()
        # While T is at its limit, errors that push it further out would only wind the sum up.
        demand = self._demand() + self.cfg.integral_gain * error
        over, under = demand > self.cfg.temperature_max, demand < self.cfg.temperature_min
        if not (over and error > 0 or under and error < 0):
            self.integral += error

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        for name in _STATE:
            setattr(self, name, state[name])
