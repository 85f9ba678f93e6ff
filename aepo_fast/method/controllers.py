"""Which entropy controller a run has."""

from __future__ import annotations

from aepo_fast.config.method import AepoConfig
from aepo_fast.config.sections import TrainerConfig
from aepo_fast.method.entropy_control import EntropyController, ProportionalController
from aepo_fast.method.observer import Observer


def make_controller(cfg: AepoConfig, trainer: TrainerConfig) -> EntropyController:
    """The controller that aepo.controller names; one whose T stays 1 where AEPO is off."""
    if cfg.controller == "observer" and cfg.enabled:
        # All updates of a step have the same T, so their momenta act as one.
        updates = trainer.minibatches * trainer.epochs
        return Observer(cfg, momentum=trainer.beta1**updates)
    return ProportionalController(cfg)
