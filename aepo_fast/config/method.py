"""The settings of the method itself: the policy loss with its rivals' options, and AEPO."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any, Literal

from aepo_fast.config.conditions import (
    Needs,
    above_zero,
    one_of,
    refuse_what_does_nothing,
    setting,
    settle_defaults,
)
from aepo_fast.config.errors import require, require_not_negative, require_positive
from aepo_fast.method.correction import CORRECTIONS, Correction
from aepo_fast.method.credit import Advantage, Aggregation
from aepo_fast.method.policy_losses import POLICY_LOSSES, PolicyLoss
from aepo_fast.method.user_loss import check_params, find_policy_loss

# The classes of the method import this module, so what it says of them is written out here;
# test_tables.py compares it with the tables of `method`.
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
# Those that leave the tokens of a sample alike, as a loss over whole sequences needs it.
SEQUENCE_ENTROPY_METHODS = ("none", "bonus", "adaptive_bonus", "ucpo", "ds_grpo")

# Those that score with a second temperature of their own, and the forms that leave it to them.
SECOND_TEMPERATURE_METHODS = ("era",)
ONE_TEMPERATURE_FORMS = ("resample",)
# The forms that weigh the policy loss of single tokens, which a loss over whole sequences has not.
TOKEN_FORMS = ("dcpo",)

Controller = Literal["observer", "pi", "published", "switch"]
Form = Literal["lift", "expected", "one_pass", "dcpo", "resample"]
CorrectionName = Literal["off", "token_truncate", "sequence_mask", "icepop"]

# What each controller uses unless the run says otherwise. Those of published are the paper's (v7).
CONTROLLER_DEFAULTS: dict[Controller, dict[str, Any]] = {
    "observer": {
        "form": "lift",
        "alpha": 1.0,
        "temperature_min": 0.9,
        "temperature_max": 2.0,
    },
    "pi": {
        "form": "lift",
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

_method = partial(one_of, "entropy_method")


_LOSS_WITH_PARAMS = Needs(
    ("policy",),
    lambda policy: len(find_policy_loss(policy).own_arguments) > 0,
    "set {} to a loss with arguments of its own",
)


def _by_policy(name: str, *needs: Needs) -> Any:
    return setting(None, needs=needs, chosen=lambda loss: getattr(loss.policy_loss, name))


# The forms whose token ratios are clipped as those of the policy loss.
_CLIPPED_FORMS = ("lift", "expected", "one_pass", "resample")


def _clips(argument: str) -> Needs:
    """The condition that the policy loss or AEPO's term reads a bound of the clip."""

    def holds(policy: str, enabled: bool, form: str) -> bool:
        loss = find_policy_loss(policy)
        by_term = enabled and form in _CLIPPED_FORMS and not loss.whole_sequences
        return by_term or loss.takes(argument)

    keys = ("loss.policy", "aepo.enabled", "aepo.form")
    fix = f"set {{}} to a loss that takes {argument}, or {{}} = true with {{}} = 'lift'"
    return Needs(keys, holds, fix)


def _policy_takes(argument: str) -> Needs:
    """The condition that the policy loss names `argument`."""
    known = [name for name, loss in POLICY_LOSSES.items() if loss.takes(argument)]
    fix = f"set {{}} = {' or '.join(map(repr, known))}"
    return Needs(("policy",), lambda policy: find_policy_loss(policy).takes(argument), fix)


def _by_correction(bound: Literal["low", "high"]) -> Any:
    def chosen(loss: LossConfig) -> float | None:  # nothing until the correction is decided
        return loss.correction and getattr(CORRECTIONS[loss.correction], f"default_{bound}")

    reading = [name for name, kind in CORRECTIONS.items() if getattr(kind, f"reads_{bound}")]
    return setting(None, needs=one_of("correction", *reading), chosen=chosen)


@dataclass(frozen=True)
class LossConfig:
    """The policy loss and its rivals' entropy methods.

    What is left out is the default of `policy` (POLICY_LOSSES), or of `correction` once that is
    decided: the bounds are None before.
    """

    # The loss of main samples: grpo, dr_grpo, dapo, cispo, sapo or gspo, which weighs whole
    # sequences; or "module:function", a loss of your own. docs/losses.md has them.
    policy: str = "grpo"
    # Arguments of the loss that the trainer does not give.
    params: dict[str, Any] = setting(default_factory=dict, needs=_LOSS_WITH_PARAMS)
    # Reward minus the mean of the prompt's samples; group_norm divides it by their spread.
    advantage: Advantage = _by_policy("advantage")
    # How tokens are averaged: all alike, first within each sample, or by rollout.max_new_tokens.
    aggregation: Aggregation = _by_policy("aggregation")
    # Lower clip: the ratio of new to old probability counts as 1 - clip_low at least.
    clip_low: float = _by_policy("clip_low", _clips("clip_low"))
    # Upper clip: the ratio counts as 1 + clip_high at most.
    clip_high: float = _by_policy("clip_high", _clips("clip_high"))
    # With a negative advantage A, the loss of a token is at most dual_clip abs(A); 0 is off.
    dual_clip: float = setting(3.0, needs=_policy_takes("dual_clip"))
    # Weight of the divergence from the reference, the model before training; 0 is off.
    kl_coef: float = 0.0
    # Estimator of that divergence: k1, k2 or k3 of Schulman.
    kl_estimator: Literal["k1", "k2", "k3"] = setting("k3", needs=above_zero("kl_coef"))
    # Another method than AEPO to hold or use entropy. docs/entropy.md explains them.
    entropy_method: EntropyMethod = "none"
    # The bonus's coefficient; with adaptive_bonus it is the first one.
    entropy_coef: float = setting(1e-3, needs=_method("bonus", "adaptive_bonus"))
    # H0 of the method, nats per token.
    adaptive_target: float = setting(0.2, needs=_method("adaptive_bonus", "entropic", "repo_r"))
    # Change of the bonus's coefficient a step.
    adaptive_delta: float = setting(1e-4, needs=_method("adaptive_bonus"))
    # Advantage that a nat of a token's entropy adds.
    advantage_entropy_coef: float = setting(0.4, needs=_method("entropy_advantage"))
    # What is added is at most abs(A) / kappa, so that A keeps its sign.
    advantage_entropy_kappa: float = setting(2.0, needs=_method("entropy_advantage"))
    # Share of tokens, those of the highest entropy, that learn.
    top_entropy_fraction: float = setting(0.2, needs=_method("top_entropy"))
    # Share of tokens that clip_cov leaves out, or that kl_cov penalises.
    cov_fraction: float = setting(2e-4, needs=_method("clip_cov", "kl_cov"))
    # Tokens are drawn among those of a covariance above this.
    clip_cov_low: float = setting(1.0, needs=_method("clip_cov"))
    clip_cov_high: float = setting(5.0, needs=_method("clip_cov"))  # and of one below this
    # Weight of kl_cov's penalty, abs(log pi - log pi_old).
    kl_cov_coef: float = setting(1.0, needs=_method("kl_cov"))

    # The rivals of method/rivals.py, with the defaults of their papers; ds_grpo_gamma is ours.

    # Gain of the error, per nat.
    entropic_kp: float = setting(1.0, needs=_method("entropic"))
    # Gain of the sum of past errors, per nat and step.
    entropic_ki: float = setting(0.01, needs=_method("entropic"))
    # The method acts on tokens of a probability above this.
    entropic_min_prob: float = setting(0.95, needs=_method("entropic"))
    # First zeta, the weight of log pi in the factor of A.
    repo_r_zeta: float = setting(1e-3, needs=_method("repo_r"))
    repo_r_zeta_min: float = setting(1e-4, needs=_method("repo_r"))  # least size of zeta
    repo_r_zeta_max: float = setting(0.05, needs=_method("repo_r"))  # largest size of zeta
    # Factor of the logits with which certain samples of A > 0 are scored.
    era_scale: float = setting(2.0, needs=_method("era"))
    # A sample is certain where the 20% of its tokens with the highest entropy have less than this
    # on average, in nats.
    era_entropy_low: float = setting(0.45, needs=_method("era"))
    # Share of a correct sample's advantage that goes by 1 / its probability among correct ones.
    ucpo_tau: float = setting(0.2, needs=_method("ucpo"))
    # Advantage per nat of a sample's log-prob: subtracted where correct, added where wrong.
    ds_grpo_gamma: float = setting(0.01, needs=_method("ds_grpo"))
    # Importance correction: how main samples are weighted by pi_trainer / pi_sampler. Auxiliary
    # samples never are. Left out: token_truncate with vLLM or rollout.steps_ahead = 1, but off with
    # gspo; else off.
    correction: CorrectionName | None = None
    # Lower bound of this ratio, see docs/rollouts.md.
    correction_low: float | None = _by_correction("low")
    # Upper bound of this ratio, see docs/rollouts.md.
    correction_high: float | None = _by_correction("high")

    @cached_property
    def policy_loss(self) -> PolicyLoss:
        """The loss that `policy` names; raises ConfigError if there is none."""
        return find_policy_loss(self.policy)

    @cached_property
    def importance_correction(self) -> Correction:
        """What `correction` names, with its bounds; none while rollouts have not decided it."""
        return CORRECTIONS[self.correction or "off"](self.correction_low, self.correction_high)

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone: a function of the user's cannot always be pickled."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def __post_init__(self) -> None:
        settle_defaults(self)
        check_params(self.policy_loss, self.params)
        self._check_correction()
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
            not self.policy_loss.whole_sequences or self.entropy_method in SEQUENCE_ENTROPY_METHODS,
            "loss.entropy_method",
            self.entropy_method,
            f"acts on single tokens, and {self.policy} weighs whole sequences",
            f"Use one of {', '.join(SEQUENCE_ENTROPY_METHODS)} with {self.policy}",
        )
        self._check_rivals()
        refuse_what_does_nothing("loss", self)

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
            not (self.policy_loss.whole_sequences and self.importance_correction.per_token),
            "loss.correction",
            self.correction,
            f"weighs single tokens, and {self.policy} weighs whole sequences",
            f'Use "sequence_mask" or "off" with {self.policy}',
        )


def _by_controller(name: str, *needs: Needs) -> Any:
    defaults = CONTROLLER_DEFAULTS
    return setting(None, needs=needs, chosen=lambda aepo: defaults[aepo.controller].get(name))


@dataclass(frozen=True)
class AepoConfig:
    """AEPO: a term that raises or lowers the policy's entropy, and the controller that holds it.

    What is left out is the default of `controller` (CONTROLLER_DEFAULTS).
    """

    enabled: bool = True  # false: the policy loss alone
    # Chooses the temperature T of the term each step: "observer" and "pi" (ours), "published"
    # (arXiv 2510.08141 v7) and "switch" (v1 to v6).
    controller: Controller = "observer"
    form: Form = _by_controller("form")  # what the term is made of, see docs/entropy.md
    entropy_target: float = 0.5  # H0, nats per token
    # Weight of the term; dcpo has a weight of its own.
    alpha: float = _by_controller(
        "alpha", one_of("form", "lift", "expected", "one_pass", "resample")
    )
    # T - 1 per nat of the entropy's error.
    gain: float | None = _by_controller("gain", one_of("controller", "published", "pi"))
    # T - 1 per nat of the sum of past errors.
    integral_gain: float | None = _by_controller("integral_gain", one_of("controller", "pi"))
    temperature_min: float = _by_controller("temperature_min")  # least T; T_low of the switch
    temperature_max: float = _by_controller("temperature_max")  # largest T; T_high of the switch
    reward_threshold: float = 1.0  # R_plus: a sample with this reward or more counts as correct
    # What divides the sum over auxiliary samples: all that were drawn, or the correct ones.
    normalizer: Literal["draws", "positives"] = setting("draws", needs=one_of("form", "resample"))
    # Bound c of rho, which is pi_T / pi of a token: rho is clamped to [1 / c, c].
    rho_clip: float = setting(3.0, needs=one_of("form", "lift", "one_pass", "dcpo"))
    # A token's weight is rho - 1 instead of rho.
    baseline: bool = setting(False, needs=one_of("form", "one_pass"))

    def __post_init__(self) -> None:
        settle_defaults(self)
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
        for name in ("gain", "integral_gain"):
            value = getattr(self, name)
            reason = "must not be negative"
            require(value is None or value >= 0, f"aepo.{name}", value, reason, "Set 0 or more")
        refuse_what_does_nothing("aepo", self)
