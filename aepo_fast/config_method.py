"""The settings of the method itself: the policy loss with its rivals' options, and AEPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from aepo_fast.config_checks import require, require_not_negative, require_positive

PolicyLoss = Literal["grpo", "dr_grpo", "dapo", "cispo", "gspo"]
Advantage = Literal["group_norm", "group_mean"]
Aggregation = Literal["token_mean", "sequence_mean", "constant_length"]
EntropyMethod = Literal[
    "none",
    "bonus",
    "adaptive_bonus",
    "entropy_advantage",
    "top_entropy",
    "clip_cov",
    "kl_cov",
    "entropic",
    "repo_r",
    "era",
    "ucpo",
    "ds_grpo",
]
# Those that leave the tokens of a row alike, as gspo needs it.
SEQUENCE_ENTROPY_METHODS = ("none", "bonus", "adaptive_bonus", "ucpo", "ds_grpo")

Controller = Literal["observer", "pi", "published", "switch"]
Form = Literal["split", "rescue", "expected", "one_pass", "dcpo", "resample"]
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
# What each controller uses unless the run says otherwise. Those of published are the paper's (v7).
CONTROLLER_DEFAULTS: dict[Controller, dict[str, Any]] = {
    "observer": {
        "form": "expected",
        "alpha": 1.0,
        "temperature_min": 0.9,
        "temperature_max": 2.0,
    },
    "pi": {
        "form": "expected",
        "alpha": 1.0,
        "gain": 1.0,
        "integral_gain": 0.05,
        "temperature_min": 1.0,
        "temperature_max": 2.0,
    },
    "published": {
        "form": "resample",
        "alpha": 1 / 64,
        "gain": 1.0,
        "temperature_min": 0.8,
        "temperature_max": 1.2,
    },
    "switch": {
        "form": "resample",
        "alpha": 1 / 64,
        "temperature_min": 0.8,
        "temperature_max": 1.2,
    },
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
    adaptive_target: float = 0.2  # nats, adaptive_bonus, entropic, repo_r
    adaptive_delta: float = 1e-4  # change of the coefficient a step, adaptive_bonus
    advantage_entropy_coef: float = 0.4  # entropy_advantage
    advantage_entropy_kappa: float = 2.0  # entropy_advantage
    top_entropy_fraction: float = 0.2  # top_entropy
    cov_fraction: float = 2e-4  # clip_cov, kl_cov
    clip_cov_low: float = 1.0  # covariance range from which clip_cov draws
    clip_cov_high: float = 5.0
    kl_cov_coef: float = 1.0
    # Rivals of entropy_rivals.py, with the defaults of their papers; ds_grpo_gamma is ours.
    entropic_kp: float = 1.0  # per nat
    entropic_ki: float = 0.01  # per nat and step
    entropic_min_prob: float = 0.95  # acts on tokens likelier than this
    repo_r_zeta: float = 1e-3  # starting value
    repo_r_zeta_min: float = 1e-4
    repo_r_zeta_max: float = 0.05
    era_scale: float = 2.0  # k, of the logits
    era_entropy_low: float = 0.45  # nats, mean of a row's top 20% of tokens
    ucpo_tau: float = 0.2
    ds_grpo_gamma: float = 0.01  # per nat
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
            self.policy != "gspo" or self.entropy_method in SEQUENCE_ENTROPY_METHODS,
            "loss.entropy_method",
            self.entropy_method,
            "acts on single tokens, and gspo weighs whole sequences",
            f"Use one of {', '.join(SEQUENCE_ENTROPY_METHODS)} with gspo",
        )
        self._check_rivals()

    def _check_rivals(self) -> None:
        require_not_negative("loss", self, "entropic_kp", "entropic_ki")
        require_positive("loss", self, "repo_r_zeta_min", "era_entropy_low", "ds_grpo_gamma")
        require(
            0 < self.entropic_min_prob < 1,
            "loss.entropic_min_prob",
            self.entropic_min_prob,
            "is the probability above which tokens are reweighted",
            "Use (0, 1), e.g. 0.95",
        )
        require(
            self.repo_r_zeta_min <= self.repo_r_zeta <= self.repo_r_zeta_max,
            "loss.repo_r_zeta",
            self.repo_r_zeta,
            "starts outside loss.repo_r_zeta_min and loss.repo_r_zeta_max, between which it moves",
            "Use e.g. 0.001 between 0.0001 and 0.05",
        )
        require(
            self.era_scale > 1,
            "loss.era_scale",
            self.era_scale,
            "must sharpen the law that positive rows are scored with",
            "Set a factor above 1, e.g. 2.0",
        )
        require(
            0 < self.ucpo_tau <= 1,
            "loss.ucpo_tau",
            self.ucpo_tau,
            "is the share of the advantage that goes by 1/q",
            "Use (0, 1], e.g. 0.2",
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


# The default of what each controller has its own value for; never seen after __post_init__.
BY_CONTROLLER: Any = None


@dataclass(frozen=True)
class AepoConfig:
    """AEPO: a term that raises or lowers the policy's entropy, and the controller that holds it.

    What is left out is the default of `controller` (CONTROLLER_DEFAULTS).
    """

    enabled: bool = True
    # Chooses T each step: "observer" and "pi" (ours), "published" (arXiv 2510.08141 v7) and
    # "switch" (v1 to v6).
    controller: Controller = "observer"
    form: Form = BY_CONTROLLER  # what the term is made of
    entropy_target: float = 0.5  # H0, nats per token
    alpha: float = BY_CONTROLLER  # weight of the term
    gain: float | None = None  # T - 1 per nat of error, published and pi
    integral_gain: float | None = None  # per nat and step, pi
    temperature_min: float = BY_CONTROLLER  # also T_low of the switch
    temperature_max: float = BY_CONTROLLER  # also T_high of the switch
    reward_threshold: float = 1.0  # R_plus: a sample with this reward or more counts as correct
    normalizer: Literal["draws", "positives"] = "draws"  # resample
    rho_clip: float = 3.0  # c, one_pass and dcpo
    baseline: bool = False  # one_pass: weight rho - 1 instead of rho

    def __post_init__(self) -> None:
        for name, default in CONTROLLER_DEFAULTS[self.controller].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        require(
            self.entropy_target > 0,
            "aepo.entropy_target",
            self.entropy_target,
            "an entropy of 0 or less cannot be held",
            "Set a target in nats, e.g. 0.5",
        )
        require(
            0 < self.temperature_min <= 1 <= self.temperature_max,
            "aepo.temperature_min/max",
            (self.temperature_min, self.temperature_max),
            "the range must contain 1, the temperature that leaves entropy alone",
            "Use e.g. temperature_min = 1.0, temperature_max = 2.0",
        )
        require_positive("aepo", self, "alpha")
        require(
            self.rho_clip >= 1,
            "aepo.rho_clip",
            self.rho_clip,
            "bounds rho to [1/c, c]",
            "Set 1 or more, e.g. 3.0",
        )
        self._refuse_what_does_nothing()

    def _refuse_what_does_nothing(self) -> None:
        for name, users in {"gain": ("published", "pi"), "integral_gain": ("pi",)}.items():
            value = getattr(self, name)
            require(
                value is None or self.controller in users,
                f"aepo.{name}",
                value,
                f"does nothing with controller = {self.controller!r}",
                f"Leave it out, or set controller = {' or '.join(map(repr, users))}",
            )
            reason = "must not be negative"
            require(value is None or value >= 0, f"aepo.{name}", value, reason, "Set 0 or more")
        unused = {
            "baseline": (False, ("one_pass",)),
            "rho_clip": (3.0, ("one_pass", "dcpo")),
            "normalizer": ("draws", ("resample",)),
        }
        for name, (default, forms) in unused.items():
            value = getattr(self, name)
            require(
                value == default or self.form in forms,
                f"aepo.{name}",
                value,
                f"does nothing with form = {self.form!r}",
                f"Leave it out, or set form = {' or '.join(map(repr, forms))}",
            )
