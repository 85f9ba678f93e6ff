"""The settings of the method itself: the policy loss with its rivals' options, and AEPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aepo_fast.config_checks import require, require_not_negative, require_positive

PolicyLoss = Literal["grpo", "dr_grpo", "dapo", "cispo", "gspo"]
Advantage = Literal["group_norm", "group_mean"]
Aggregation = Literal["token_mean", "sequence_mean", "constant_length"]
EntropyMethod = Literal[
    "none", "bonus", "adaptive_bonus", "entropy_advantage", "top_entropy", "clip_cov", "kl_cov"
]

Correction = Literal["off", "token_truncate", "sequence_mask", "icepop"]

# What each policy loss uses unless the run says otherwise:
# advantage, aggregation, clip_low, clip_high.
POLICY_DEFAULTS: dict[str, tuple[Advantage, Aggregation, float, float]] = {
    "grpo": ("group_norm", "sequence_mean", 0.2, 0.2),
    "dr_grpo": ("group_mean", "constant_length", 0.2, 0.2),
    "dapo": ("group_norm", "token_mean", 0.2, 0.28),
    "cispo": ("group_norm", "token_mean", 0.2, 0.28),
    "gspo": ("group_norm", "sequence_mean", 3e-4, 4e-4),
}
# correction_low, correction_high, unless the run says otherwise.
CORRECTION_DEFAULTS: dict[str, tuple[float, float]] = {
    "off": (0.0, 1.0),
    "token_truncate": (0.0, 2.0),
    "sequence_mask": (0.0, 3.0),
    "icepop": (0.5, 5.0),
}


@dataclass(frozen=True)
class LossConfig:
    """The policy loss; None means the default of `policy` (POLICY_DEFAULTS)."""

    policy: PolicyLoss = "grpo"
    advantage: Advantage | None = None
    aggregation: Aggregation | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float = 3.0  # 0 is off
    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_method: EntropyMethod = "none"
    entropy_coef: float = 1e-3  # bonus, adaptive_bonus (starting value)
    adaptive_target: float = 0.2  # nats, adaptive_bonus
    adaptive_delta: float = 1e-4  # change of the coefficient a step, adaptive_bonus
    advantage_entropy_coef: float = 0.4  # entropy_advantage
    advantage_entropy_kappa: float = 2.0  # entropy_advantage
    top_entropy_fraction: float = 0.2  # top_entropy
    cov_fraction: float = 2e-4  # clip_cov, kl_cov
    clip_cov_low: float = 1.0  # covariance range from which clip_cov draws
    clip_cov_high: float = 5.0
    kl_cov_coef: float = 1.0
    # Weight of main rows for pi_trainer / pi_sampler, see `correction`; never of auxiliary rows.
    correction: Correction | None = None  # None: token_truncate with vllm, else off
    correction_low: float | None = None
    correction_high: float | None = None

    def __post_init__(self) -> None:
        defaults = POLICY_DEFAULTS[self.policy]
        names = ("advantage", "aggregation", "clip_low", "clip_high")
        for name, default in zip(names, defaults, strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        bounds = CORRECTION_DEFAULTS[self.correction or "token_truncate"]
        for name, bound in zip(("correction_low", "correction_high"), bounds, strict=True):
            if self.correction is not None and getattr(self, name) is None:
                object.__setattr__(self, name, bound)
        self._check_correction()
        assert self.clip_low is not None
        require_positive("loss", self, "clip_low", "clip_high")
        require_not_negative("loss", self, "dual_clip", "kl_coef")
        require(
            self.clip_low < 1,
            "loss.clip_low",
            self.clip_low,
            "would allow a ratio of 0 or less",
            "Set a value below 1, e.g. 0.2",
        )
        require(
            self.dual_clip == 0 or self.dual_clip > 1,
            "loss.dual_clip",
            self.dual_clip,
            "bounds the ratio of negative advantages from above, so it must exceed 1",
            "Use 3.0, or 0 to switch it off",
        )
        for name in ("top_entropy_fraction", "cov_fraction"):
            value = getattr(self, name)
            require(0 < value <= 1, f"loss.{name}", value, "is a share of tokens", "Use (0, 1]")
        require(
            self.policy != "gspo" or self.entropy_method in ("none", "bonus", "adaptive_bonus"),
            "loss.entropy_method",
            self.entropy_method,
            "acts on single tokens, and gspo weighs whole sequences",
            "Use none, bonus or adaptive_bonus with gspo",
        )

    def _check_correction(self) -> None:
        low, high = self.correction_low, self.correction_high
        if low is not None and high is not None:
            require(
                0 <= low <= 1 <= high,
                "loss.correction_low/high",
                (low, high),
                "the bounds of a probability ratio must contain 1, the ratio of equal laws",
                "Leave them out for the defaults of loss.correction",
            )
        require(
            self.policy != "gspo" or self.correction in (None, "off", "sequence_mask"),
            "loss.correction",
            self.correction,
            "weighs single tokens, and gspo weighs whole sequences",
            'Use "sequence_mask" or "off" with gspo',
        )


@dataclass(frozen=True)
class AepoConfig:
    """AEPO: the temperature-regulated REINFORCE term and its entropy controller."""

    enabled: bool = True
    form: Literal["resample", "one_pass", "dcpo"] = "resample"
    controller: Literal["proportional", "switch"] = "proportional"
    entropy_target: float = 0.5  # H0, nats per token
    alpha: float = 1 / 64
    gain: float = 1.0  # k, per nat
    integral_gain: float = 0.0  # per nat and step; stops while T is at its limit
    lead_steps: float = 0.0  # steps to look ahead along the entropy's trend
    ramp_steps: int = 0  # steps over which the target falls from the first entropy to H0
    temperature_min: float = 0.8  # also T_low of the switch
    temperature_max: float = 1.2  # also T_high of the switch
    reward_threshold: float = 1.0  # R_plus
    normalizer: Literal["draws", "positives"] = "draws"
    rho_clip: float = 3.0  # c, one_pass and dcpo
    baseline: bool = False  # one_pass: weight rho - 1 instead of rho

    def __post_init__(self) -> None:
        require(
            self.entropy_target > 0,
            "aepo.entropy_target",
            self.entropy_target,
            "an entropy of 0 or less cannot be held",
            "Set a target in nats, e.g. 0.5",
        )
        t_range = (self.temperature_min, self.temperature_max)
        require(
            0 < self.temperature_min <= 1 <= self.temperature_max,
            "aepo.temperature_min/max",
            t_range,
            "the range must contain 1, the temperature that leaves entropy alone",
            "Use e.g. temperature_min = 0.8, temperature_max = 1.2",
        )
        require_positive("aepo", self, "alpha")
        require_not_negative("aepo", self, "gain", "integral_gain", "lead_steps", "ramp_steps")
        require(
            self.rho_clip >= 1,
            "aepo.rho_clip",
            self.rho_clip,
            "bounds rho to [1/c, c]",
            "Set 1 or more, e.g. 3.0",
        )
        require(
            not self.baseline or self.form == "one_pass",
            "aepo.baseline",
            self.baseline,
            f"has no meaning with form = {self.form!r}",
            'Set form = "one_pass" or baseline = false',
        )
        # DCPO's share looks ahead, whichever sets the temperature.
        unused = ("integral_gain",) if self.form == "dcpo" else ("integral_gain", "lead_steps")
        for name in unused:
            require(
                self.controller != "switch" or getattr(self, name) == 0,
                f"aepo.{name}",
                getattr(self, name),
                "has no meaning for a switch, which looks at the last entropy alone",
                f'Set controller = "proportional" or {name} = 0',
            )
