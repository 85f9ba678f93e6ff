"""TRL's GRPOConfig with AEPO's settings, and what AEPO refuses of TRL's."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from trl import GRPOConfig

from aepo_fast.config.errors import ConfigError, require
from aepo_fast.config.method import AepoConfig, Controller, Form
from aepo_fast.integrations.terms import FORMS
from aepo_fast.method.credit import Aggregation

PREFIX = "aepo_"

# How TRL averages tokens with its loss types, where our aggregations have the same.
AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": "sequence_mean",
    "sapo": "sequence_mean",
    "dr_grpo": "constant_length",
    "dapo": "token_mean",
    "cispo": "token_mean",
}


@dataclass
class AEPOConfig(GRPOConfig):
    """GRPOConfig with AEPO's settings: aepo_X is X of `AepoConfig`, with its default where None.

    Raises ConfigError for settings that cannot run together.
    """

    aepo_enabled: bool = True
    aepo_controller: Controller | None = None
    aepo_form: Form | None = None
    aepo_entropy_target: float | None = None
    aepo_alpha: float | None = None
    aepo_gain: float | None = None
    aepo_integral_gain: float | None = None
    aepo_temperature_min: float | None = None
    aepo_temperature_max: float | None = None
    aepo_reward_threshold: float | None = None
    aepo_normalizer: Literal["draws", "positives"] | None = None
    aepo_rho_clip: float | None = None
    aepo_baseline: bool | None = None

    @property
    def aepo(self) -> AepoConfig:
        """AEPO's settings, with all defaults."""
        given = {item.name: getattr(self, PREFIX + item.name) for item in fields(AepoConfig)}
        try:
            return AepoConfig(**{name: value for name, value in given.items() if value is not None})
        except ConfigError as error:
            texts = (error.reason, error.fix)
            reason, fix = (text.replace("aepo.", PREFIX) for text in texts)
            key = error.key.replace("aepo.", PREFIX)
            raise ConfigError(key, error.value, reason, fix) from None

    @property
    def aggregation(self) -> Aggregation:
        """How TRL averages tokens with `loss_type`."""
        return AGGREGATIONS[self.loss_type]

    @property
    def steps_per_rollout(self) -> int:
        """Micro-batches that learn from the same samples, before TRL samples again."""
        return self.steps_per_generation * self.num_iterations

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps with the same T: those of a rollout, or the one of several rollouts."""
        return max(1, self.steps_per_rollout // self.gradient_accumulation_steps)

    @property
    def term_clip(self) -> tuple[float, float]:
        """By how much the token ratios of AEPO's term may lie below and above 1."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        # With cispo TRL takes epsilon_high for the largest ratio itself.
        return self.epsilon, high - 1 if self.loss_type == "cispo" else high

    def __post_init__(self) -> None:
        super().__post_init__()
        aepo = self.aepo
        if not aepo.enabled:
            return
        require(
            aepo.form in FORMS,
            "aepo_form",
            aepo.form,
            "cannot run inside TRL, which neither samples at a second temperature nor gives AEPO "
            "its policy loss",
            f"Set aepo_form = {' or '.join(map(repr, FORMS))}",
        )
        require(
            self.temperature == 1,
            "temperature",
            self.temperature,
            "AEPO holds the entropy of the policy at temperature 1, which has to be the one that "
            "samples",
            "Leave it at 1.0",
        )
        require(
            self.loss_type in AGGREGATIONS,
            "loss_type",
            self.loss_type,
            "averages tokens as none of AEPO's aggregations does",
            f"Use one of {', '.join(AGGREGATIONS)}; dapo is the mean over all tokens",
        )
        require(
            0 < self.term_clip[1],
            "epsilon_high",
            self.epsilon_high,
            f"is with loss_type = {self.loss_type!r} the largest ratio of new to old probability, "
            "which must exceed 1",
            "Set e.g. epsilon_high = 1.28",
        )
        accumulated = self.gradient_accumulation_steps
        require(
            self.steps_per_rollout % accumulated == 0 or accumulated % self.steps_per_rollout == 0,
            "gradient_accumulation_steps",
            accumulated,
            f"an update would end within a rollout of steps_per_generation * num_iterations = "
            f"{self.steps_per_rollout} micro-batches, whose T would then change",
            "Make one a multiple of the other",
        )
        require(
            not self.torch_compile,
            "torch_compile",
            self.torch_compile,
            "would trace TRL's head, in whose place AEPO puts one with a second temperature",
            "Leave it out",
        )
