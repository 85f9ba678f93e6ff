"""Which entropy controller a run has, and what moves the coefficients of AEPO's rivals."""

from __future__ import annotations

import math
from collections.abc import Callable

from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.config.sections import TrainerConfig
from aepo_fast.method.entropy_control import (
    EntropyController,
    ProportionalController,
    SwitchController,
)
from aepo_fast.method.observer import Observer
from aepo_fast.method.rivals import make_regulariser


def make_controller(cfg: AepoConfig, trainer: TrainerConfig) -> EntropyController:
    """The controller that aepo.controller names; one whose T stays 1 where AEPO is off."""
    if not cfg.enabled:
        return ProportionalController(cfg)
    return CONTROLLERS[cfg.controller](cfg, trainer)


def _observer(cfg: AepoConfig, trainer: TrainerConfig) -> Observer:
    # All updates of a step have the same T, so their momenta act as one.
    return Observer(cfg, momentum=trainer.beta1 ** (trainer.minibatches * trainer.epochs))


CONTROLLERS: dict[str, Callable[[AepoConfig, TrainerConfig], EntropyController]] = {
    "observer": _observer,
    "pi": lambda cfg, _: ProportionalController(cfg),
    "published": lambda cfg, _: ProportionalController(cfg),
    "switch": lambda cfg, _: SwitchController(cfg),
}


class BonusCoefficient:
    """Coefficient of the entropy bonus, 0 for methods without one."""

    def __init__(self, cfg: LossConfig) -> None:
        self.method = make_regulariser(cfg)
        self.coef = cfg.entropy_coef
        self.entropy: float | None = None

    @property
    def value(self) -> float:
        """The coefficient to use in the coming step."""
        return self.method.bonus(self.coef, self.entropy)

    def update(self, entropy: float) -> None:
        """Take in the entropy of a step; one that is not finite is not a measurement."""
        if not math.isfinite(entropy):
            return
        self.entropy = entropy
        self.coef = self.method.next_bonus(self.coef, entropy)

    def state_dict(self) -> dict[str, float | None]:
        """What a checkpoint needs: a coefficient only where it is no setting."""
        return {"coef": self.coef if self.method.adapts_bonus else None, "entropy": self.entropy}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Go on from a saved state; a constant coefficient is the configured one."""
        self.entropy = state["entropy"]
        if self.method.adapts_bonus and state["coef"] is not None:
            self.coef = state["coef"]


class RivalController:
    """The lever of a rival (a of EntroPIC, zeta of REPO-R), moved by each step's entropy.

    It stays 0 for other methods.
    """

    def __init__(self, cfg: LossConfig) -> None:
        self.name = cfg.entropy_method
        self.method = make_regulariser(cfg)
        self.value = self.method.first_lever()
        self.integral = 0.0

    def update(self, entropy: float) -> None:
        """Take in the entropy of a step; one that is not finite is not a measurement."""
        if math.isfinite(entropy):
            self.value, self.integral = self.method.next_lever(self.value, self.integral, entropy)

    def state_dict(self) -> dict[str, float | str]:
        """What a checkpoint needs."""
        return {"method": self.name, "value": self.value, "integral": self.integral}

    def load_state_dict(self, state: dict[str, float | str]) -> None:
        """Go on from a saved state; what another method left is no starting value."""
        if state["method"] == self.name:
            self.value, self.integral = float(state["value"]), float(state["integral"])
