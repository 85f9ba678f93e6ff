"""The forms of AEPO's term: for each, its term per token, and what it asks for."""

from __future__ import annotations

import torch

from aepo_fast.config.method import AepoConfig
from aepo_fast.method import aepo_terms
from aepo_fast.method.policy_losses import probability_ratio
from aepo_fast.method.tokens import Columns, StepContext, Tokens

# The bounds of a token's ratio: low and high.
Clip = tuple[float, float]


class AepoForm:
    """What AEPO adds to the loss of main samples: by itself nothing, as where it is off."""

    draws_auxiliary = False  # samples drawn at T, beside the main ones

    def __init__(self, aepo: AepoConfig) -> None:
        self.aepo = aepo

    def second_temperature(self, temperature: float) -> float | None:
        """The temperature of the second log-prob at AEPO's T, None where the form needs none."""
        return None

    def active_samples(self, per_sample: Columns, temperature: float) -> torch.Tensor:
        """Bool [R]: samples with a gradient from the form, whatever their advantage."""
        return torch.zeros_like(per_sample["main"], dtype=torch.bool)

    def rho(self, tokens: Tokens) -> torch.Tensor | None:
        """pi_T / pi, clamped, [N] without gradient; None where the form does not use it."""
        return None

    def advantage(
        self, advantage: torch.Tensor, rho: torch.Tensor | None, column: Columns, mix: float
    ) -> torch.Tensor:
        """The advantage of the policy loss, [N]; mix: DCPO's share of AEPO's signal."""
        return advantage

    def token_term(
        self, tokens: Tokens, rho: torch.Tensor | None, context: StepContext, clip: Clip
    ) -> torch.Tensor | None:
        """The term, [N], before aepo.alpha and the correction; None where it is zero."""
        return None


class Resample(AepoForm):
    """Positives among auxiliary samples, drawn at T (arXiv 2510.08141), which carry the term."""

    draws_auxiliary = True


class _SilentAtOne(AepoForm):
    """A form with a gradient on positive samples, and none at T = 1."""

    def second_temperature(self, temperature: float) -> float | None:
        """T, but at T = 1 the term is zero."""
        return None if temperature == 1 else temperature

    def active_samples(self, per_sample: Columns, temperature: float) -> torch.Tensor:
        """The positive ones, unless T = 1."""
        return (per_sample["positive"] > 0) & (temperature != 1)


class Expected(_SilentAtOne):
    """The one-pass term summed over the vocabulary, on positive samples (`expected_token_loss`)."""

    def token_term(
        self, tokens: Tokens, rho: torch.Tensor | None, context: StepContext, clip: Clip
    ) -> torch.Tensor | None:
        """-w (log pi - T log pi_T) with w the ratio of positives."""
        if context.temperature == 1:
            return None
        assert tokens.second_logprob is not None
        low, high = clip
        # With several updates a state counts as often as the policy would now go on from there.
        ratio = probability_ratio(tokens.logprob, tokens.old_logprob).detach()
        weight = tokens.column["positive"] * ratio.clamp(1 - low, 1 + high)
        return aepo_terms.expected_token_loss(
            tokens.logprob, tokens.second_logprob, context.temperature, weight
        )


class _ByRatio(AepoForm):
    """A form that weighs the sampled tokens of positive samples by rho."""

    def second_temperature(self, temperature: float) -> float | None:
        """T, also at T = 1, where rho is 1."""
        return temperature

    def active_samples(self, per_sample: Columns, temperature: float) -> torch.Tensor:
        """The positive ones."""
        return per_sample["positive"] > 0

    def rho(self, tokens: Tokens) -> torch.Tensor | None:
        """pi_T / pi of the policy that sampled; None without log-probs at T."""
        if tokens.second_logprob is None:
            return None
        second = tokens.column.get("old_second_logprob", tokens.second_logprob.detach())
        return aepo_terms.temperature_ratio(second, tokens.old_logprob, self.aepo.rho_clip)


class Lift(_SilentAtOne, _ByRatio):
    """A surrogate that lifts what is likelier at T, on positive samples (`lift_token_loss`)."""

    def token_term(
        self, tokens: Tokens, rho: torch.Tensor | None, context: StepContext, clip: Clip
    ) -> torch.Tensor | None:
        """The surrogate of the positive samples; None at T = 1."""
        if rho is None:
            return None
        terms = aepo_terms.lift_token_loss(tokens.logprob, tokens.old_logprob, rho, *clip)
        return tokens.column["positive"] * terms.loss


class OnePass(_ByRatio):
    """A second surrogate on positive samples, with the weight rho (`one_pass_token_loss`)."""

    def token_term(
        self, tokens: Tokens, rho: torch.Tensor | None, context: StepContext, clip: Clip
    ) -> torch.Tensor | None:
        """The surrogate of the positive samples."""
        assert rho is not None
        terms = aepo_terms.one_pass_token_loss(
            tokens.logprob, tokens.old_logprob, rho, *clip, baseline=self.aepo.baseline
        )
        return tokens.column["positive"] * terms.loss


class Dcpo(_ByRatio):
    """rho of positive samples mixed into the advantage (arXiv 2601.12730)."""

    def advantage(
        self, advantage: torch.Tensor, rho: torch.Tensor | None, column: Columns, mix: float
    ) -> torch.Tensor:
        """(1 - a) A + a R rho."""
        if rho is None:
            return advantage
        return aepo_terms.dcpo_advantage(advantage, rho, column["positive"], mix)


FORMS: dict[str, type[AepoForm]] = {
    "lift": Lift,
    "expected": Expected,
    "one_pass": OnePass,
    "dcpo": Dcpo,
    "resample": Resample,
}


def make_form(aepo: AepoConfig) -> AepoForm:
    """The form that `aepo.form` names; one that adds nothing where AEPO is off."""
    return FORMS[aepo.form](aepo) if aepo.enabled else AepoForm(aepo)
