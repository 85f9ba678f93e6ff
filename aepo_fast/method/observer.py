"""The observer: an entropy controller that learns from the run how its policy responds to T.

With u = T - 1 and Adam's momentum b, the entropy H moves in a step as

    v' = b v + (1 - b) (a u + d),    H' = H + v'

v is its speed, d the drift that GRPO causes, and a the response to u, all in nats a step. None of
them is known, and each step measures H with an error. An extended Kalman filter follows
(H, v, d, log a): every step corrects them by how far the measured entropy lay from the predicted
one, each as much as it is in doubt.

Phi = H + b / (1 - b) v is where H comes to rest without further push, and moves by exactly
a u + d. So Phi is controlled: a law that waited for H itself would act late.

T goes little below 1. So errors of the estimate do not cancel: those that raise T act, those that
would lower it are cut off, and H lies too high. So the law aims below the target by less than the
standard error of a measurement, and once H has arrived, the aim moves by how far H still is from
the target.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from aepo_fast.config.method import AepoConfig
from aepo_fast.method.entropy_control import Measurement

# The share of the distance to the target that a step is to cover.
_PACE = 0.25
# Before it is learned: a response of 0.2 nats a step at T = 2, known to a factor of e^1.5 = 4.5.
# The small tasks at lr 6e-4 had 0.1 to 0.6, SmolLM2 at 2e-5 had 1.2; it grows with lr and alpha.
_FIRST_RESPONSE, _FIRST_DOUBT = 0.2, 1.5
# A step changes log a by at most so much, and a stays within e^2.5 = 12 times its first value:
# while T is near 1 its effect is small beside the noise, which would pass for a strong response.
_MOST_LEARNED, _MOST_LOG = 0.3, 2.5
# Of a measurement whose standard error cannot be told, nats.
_UNKNOWN_ERROR = 0.1
# The share of its past that the square of the standard error keeps from step to step. A step's own
# is high where its entropy is: taken alone, it would let low measurements count more, and the
# estimate would lie below the entropy. In the three runs of first-light under bench/results/cpu
# from 2026-11-28 on, the mean weighted so was 0.04 to 0.06 nats below the plain one.
_NOISE_KEPT = 0.9
# Until H has arrived, the law aims so many standard errors of a measurement below the target. Then
# its aim moves by this share of the distance a step, and stays within one standard error. With
# more than _PACE / 4, aim and push together would swing. The FadingPlant of
# tests/aepo_fast/method/test_observer.py is held 2% above its target, with 0.5 or 1 instead of
# 0.75 as well; with neither 22%.
_CAUTION, _AIMING = 0.75, _PACE / 4
# H has arrived where its estimate is at most so many times the target.
_ARRIVED = 1.1
# Until then, T goes below 1 only as far as H falls by less than this share of itself a step.
# Cooled without that limit, the task `write` at 0.25 nats, where GRPO alone is fast enough, ended
# at rewards of 0.86 and 0.87 instead of 0.91 and 0.92 (small-cooling and small in
# bench/results/cpu/entropy, seeds 0 and 1).
_FALL = 0.02
# T changes by at most so much a step: the response is seen before it can throw the policy off. It
# does so up and down, since a limit on one side would turn the estimate's noise into a bias.
_MOST_CHANGE = 0.05
# Where H will come to rest at more than so many times the target, T falls at once.
_FAR_ABOVE = 1.4
# Standard deviations by which a step changes what is followed: speed and drift in nats a step, as
# a floor and as a share of the present speed and of the drift, and log a. GRPO's drift fades once
# most samples are right. The less momentum, the sooner that shows, and the larger the drift's share
# may be: 0.2 (1 - b). With 0.03, first-light (b = 0.5) kept the drift of the way down in its
# estimate, and T held H 25% above the target (bench/results/cpu/first-light-20261128-074100.jsonl).
_DRIFT_SHARE = 0.2
_SPEED_FLOOR, _DRIFT_FLOOR, _SHARE, _LOG_RESPONSE = 0.003, 0.002, 0.1, 0.03
# The response counts as known where its standard error is below this share of it.
KNOWN_WITHIN = 0.5


class Observer:
    """Chooses T from what it has learned of the policy's response, see the module.

    momentum: b, the share of its past that Adam's first moment keeps from step to step.
    """

    def __init__(self, cfg: AepoConfig, *, momentum: float) -> None:
        self.cfg, self.momentum = cfg, momentum
        self.entropy: float | None = None
        self.noise: float | None = None  # square of a measurement's standard error, smoothed
        self.last = 1.0  # T of the last step
        self.arrived = False  # whether H has been at the target
        self.shift = 0.0  # of the aim from the target, nats
        # (H, v, d, log a) and its covariance; H unknown until measured.
        self.state = np.array([0.0, 0.0, 0.0, math.log(_FIRST_RESPONSE)])
        self.covariance = np.diag([1.0, 0.1**2, 0.1**2, _FIRST_DOUBT**2])

    def temperature(self) -> float:
        """T for the coming step."""
        cfg = self.cfg
        if self.entropy is None:
            return 1.0
        entropy, speed, drift, log_response = self.state
        rest = entropy + self.momentum / (1 - self.momentum) * speed
        response = math.exp(log_response)
        aim = cfg.entropy_target + self.shift
        push = (_PACE * (aim - rest) - drift) / response
        least = cfg.temperature_min
        if not self.arrived:  # GRPO does the cooling; what it lacks is added
            least = max(least, 1 + min((-_FALL * rest - drift) / response, 0.0))
        if rest < _FAR_ABOVE * cfg.entropy_target:
            least = max(least, self.last - _MOST_CHANGE)
        most = min(cfg.temperature_max, self.last + _MOST_CHANGE)
        return float(max(min(1 + push, most), least))

    def _doubt(self) -> float:
        return math.sqrt(self.covariance[3, 3])

    def update(self, step: Measurement) -> None:
        """Take in a step: correct by its measurement, predict what its updates did."""
        self.last = step.temperature
        if math.isfinite(step.entropy):
            self._correct(step.entropy, step.stderr)
            self._take_aim()
        if step.updates and self.entropy is not None:
            self._predict(step.temperature - 1)

    def _take_aim(self) -> None:
        target, entropy = self.cfg.entropy_target, float(self.state[0])
        error = math.sqrt(self.noise or 0.0)
        self.arrived |= entropy <= _ARRIVED * target
        shift = self.shift + _AIMING * (target - entropy) if self.arrived else -_CAUTION * error
        self.shift = min(max(shift, -error), error)

    def _correct(self, entropy: float, stderr: float) -> None:
        noise = (stderr if math.isfinite(stderr) else _UNKNOWN_ERROR) ** 2  # of a single prompt
        before = noise if self.noise is None else self.noise
        self.noise = _NOISE_KEPT * before + (1 - _NOISE_KEPT) * noise
        if self.entropy is None:
            # GRPO is taken to be fast enough until its drift is known.
            self.state[0], self.state[2] = entropy, -_FALL * entropy
            self.covariance[0, 0] = noise
            self.entropy = entropy
            return
        self.entropy = entropy
        variance = self.covariance[0, 0] + self.noise
        gain = self.covariance[:, 0] / max(variance, 1e-12)
        change = gain * (entropy - self.state[0])
        change[3] = np.clip(change[3], -_MOST_LEARNED, _MOST_LEARNED)
        self.state = self.state + change
        first = math.log(_FIRST_RESPONSE)
        self.state[3] = np.clip(self.state[3], first - _MOST_LOG, first + _MOST_LOG)
        self.covariance = self.covariance - np.outer(gain, self.covariance[0])

    def _predict(self, push: float) -> None:
        b = self.momentum
        entropy, speed, drift, log_response = self.state
        effect = math.exp(log_response) * push
        later = b * speed + (1 - b) * (effect + drift)
        self.state = np.array([entropy + later, later, drift, log_response])
        row = [b, 1 - b, (1 - b) * effect]
        change = np.array([[1, *row], [0, *row], [0, 0, 1, 0], [0, 0, 0, 1]])
        pace = _SHARE * abs(later)
        drifting = _DRIFT_FLOOR + max(pace, _DRIFT_SHARE * (1 - b) * abs(drift))
        noise = np.diag([0.0, 0.0, drifting**2, _LOG_RESPONSE**2])
        noise[:2, :2] = (_SPEED_FLOOR + pace) ** 2  # an unforeseen speed moves H as well
        self.covariance = change @ self.covariance @ change.T + noise

    def metrics(self) -> dict[str, float]:
        """The response in nats a step, NaN while it is not known well enough, and its doubt."""
        doubt = self._doubt()
        known = doubt < KNOWN_WITHIN
        return {
            "aepo/response": math.exp(self.state[3]) if known else math.nan,
            "aepo/response_error": doubt,
            "aepo/drift": float(self.state[2]),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {
            "entropy": self.entropy,
            "noise": self.noise,
            "last": self.last,
            "arrived": self.arrived,
            "shift": self.shift,
            "state": self.state.tolist(),
            "covariance": self.covariance.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, or from that of another controller with its last entropy."""
        if "state" in state:
            self.entropy, self.last = state["entropy"], state["last"]
            self.arrived = state["arrived"]
            self.noise = state.get("noise")  # older checkpoints have neither
            self.shift = state.get("shift", 0.0)
            self.state = np.array(state["state"])
            self.covariance = np.array(state["covariance"])
        elif state["entropy"] is not None:
            self._correct(state["entropy"], 0.0)
            self.noise = None  # nothing is known of later measurements' errors
