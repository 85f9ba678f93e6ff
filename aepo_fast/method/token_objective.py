"""The loss itself: policy loss, regularisers and AEPO's term, summed over tokens.

The loss of single tokens and that of whole samples have the same parts and differ in how they add
them up: the one has a policy loss per token, the other one per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.method import aepo_terms
from aepo_fast.method.correction import Correction
from aepo_fast.method.forms import AepoForm, Clip, make_form
from aepo_fast.method.metric_sums import MetricSum
from aepo_fast.method.policy_losses import TokenTerms, kl_to_reference
from aepo_fast.method.regularisers import Regulariser
from aepo_fast.method.rivals import make_regulariser
from aepo_fast.method.tokens import Columns, StepContext, Tokens

# AEPO's clip of token ratios, eps of arXiv 2510.08141, where loss.clip_low and clip_high bound
# those of whole sequences: tokens spread far wider, and most would lose their gradient.
_TOKEN_CLIP = (0.2, 0.2)

Metrics = dict[MetricSum, torch.Tensor]
TokenLoss = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, Columns], tuple[torch.Tensor, Metrics]
]
SequenceLoss = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, Columns],
    tuple[torch.Tensor, Metrics],
]


def taking_slices(
    token_loss: TokenLoss, names: Sequence[str]
) -> Callable[..., tuple[torch.Tensor, Metrics]]:
    """`token_loss` as `linear_token_loss` calls it: slice i is the column names[i]."""

    def of_slices(
        logprob: torch.Tensor,
        entropy: torch.Tensor,
        second_logprob: torch.Tensor | None,
        *slices: torch.Tensor,
    ) -> tuple[torch.Tensor, Metrics]:
        return token_loss(logprob, entropy, second_logprob, dict(zip(names, slices, strict=True)))

    return of_slices


def make_token_loss(loss: LossConfig, aepo: AepoConfig, context: StepContext) -> TokenLoss:
    """The loss of any tokens, additive over them: takes their log-probs, entropies and columns."""
    parts = _make_parts(loss, aepo, context)

    def token_loss(
        logprob: torch.Tensor,
        entropy: torch.Tensor,
        second_logprob: torch.Tensor | None,
        column: Columns,
    ) -> tuple[torch.Tensor, Metrics]:
        tokens = _tokens(logprob, entropy, second_logprob, column)
        rho = parts.form.rho(tokens)
        policy = parts.policy_terms(tokens, rho, None)  # [N]
        weights = parts.correction.weights(tokens)
        per_token = weights * parts.regulariser.on_policy_loss(policy.loss, tokens)
        for term in parts.other_terms(tokens, rho):
            scale = term.coef * weights if term.corrected else term.coef
            per_token = per_token + scale * term.values
        resampled, aux_metrics = parts.resampled(tokens)
        total = (column["weight"] * per_token).sum() + resampled
        return total, parts.metrics(tokens, policy, weights, rho) | aux_metrics

    return token_loss


def make_sequence_loss(loss: LossConfig, aepo: AepoConfig, context: StepContext) -> SequenceLoss:
    """The loss over the samples of a micro-batch, whose tokens it also takes with their sample."""
    parts = _make_parts(loss, aepo, context)

    def sequence_loss(
        logprob: torch.Tensor,
        entropy: torch.Tensor,
        second_logprob: torch.Tensor | None,
        sample_of_token: torch.Tensor,
        column: Columns,
    ) -> tuple[torch.Tensor, Metrics]:
        tokens = _tokens(logprob, entropy, second_logprob, column)
        rho = parts.form.rho(tokens)
        policy = parts.policy_terms(tokens, None, sample_of_token)  # [R]
        weights = parts.correction.weights(tokens)
        corrected = weights * column["weight"]
        # Columns are equal along a sample, so a sample's weight is the sum of its tokens' weights.
        zeros = torch.zeros_like(policy.clipped_low)
        sample_weight = zeros.index_add(0, sample_of_token, corrected)
        total = (sample_weight * policy.loss).sum()
        for term in parts.other_terms(tokens, rho):
            weight = corrected if term.corrected else column["weight"]
            total = total + term.coef * (weight * term.values).sum()
        resampled, aux_metrics = parts.resampled(tokens)
        spread = TokenTerms(*(part[sample_of_token] for part in policy))
        return total + resampled, parts.metrics(tokens, spread, weights, rho) | aux_metrics

    return sequence_loss


def _tokens(
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    second_logprob: torch.Tensor | None,
    column: Columns,
) -> Tokens:
    # Before the first update the current policy is the one that sampled: its ratio is 1.
    old = column.get("old_logprob", logprob.detach())
    return Tokens(logprob, old, entropy, second_logprob, column)


class _Term(NamedTuple):
    """A part of the loss of main samples besides the policy loss: coef * values, [N].

    corrected: weighted for the sampler's law, as the policy loss is.
    """

    coef: float
    values: torch.Tensor
    corrected: bool


@dataclass(frozen=True)
class _Parts:
    """The parts of the loss, each stated once for tokens and for samples."""

    loss: LossConfig
    aepo: AepoConfig
    context: StepContext
    correction: Correction
    regulariser: Regulariser
    form: AepoForm

    def policy_terms(
        self, tokens: Tokens, rho: torch.Tensor | None, sample_of_token: torch.Tensor | None
    ) -> TokenTerms:
        """The policy loss: per token [N], or with sample_of_token per sample [R]."""
        loss, change = self.loss, self.regulariser
        advantage = change.shape_advantage(tokens.column["advantage"], tokens.entropy)
        advantage = self.form.advantage(advantage, rho, tokens.column, self.context.dcpo_mix)
        advantage = change.scale_advantage(advantage, tokens.logprob, self.context.lever)
        logprob, old_logprob = change.ratio_logprobs(tokens)
        given = {
            "logprob": logprob,
            "old_logprob": old_logprob,
            "advantage": advantage,
            "entropy": tokens.entropy,
            "second_logprob": tokens.second_logprob,
            "clip_low": loss.clip_low,
            "clip_high": loss.clip_high,
            "dual_clip": loss.dual_clip,
            "sample_of_token": sample_of_token,
        }
        return loss.policy_loss.terms(given, loss.params)

    def other_terms(self, tokens: Tokens, rho: torch.Tensor | None) -> Iterator[_Term]:
        """KL to the reference, entropy bonus and AEPO's term, where they are on."""
        if self.loss.kl_coef > 0:
            yield _Term(self.loss.kl_coef, self._kl(tokens), corrected=False)
        if self.context.bonus_coef:
            yield _Term(-self.context.bonus_coef, tokens.entropy, corrected=False)
        term = self.form.token_term(tokens, rho, self.context, self._token_clip)
        if term is not None:
            yield _Term(self.aepo.alpha, term, corrected=True)

    def resampled(self, tokens: Tokens) -> tuple[torch.Tensor, Metrics]:
        """AEPO's resampling term over the auxiliary positives, and its clip count."""
        weight = tokens.column["aux_weight"]
        terms = aepo_terms.resample_token_loss(
            tokens.logprob, tokens.old_logprob, *self._token_clip
        )
        on_aux = (weight > 0).float()
        metrics = {
            MetricSum.AUX_TOKENS: on_aux.sum(),
            MetricSum.AUX_CLIP: (on_aux * terms.clipped_high).sum(),
        }
        return (weight * terms.loss).sum(), metrics

    @torch.no_grad()
    def metrics(
        self,
        tokens: Tokens,
        policy: TokenTerms,
        weights: torch.Tensor,
        rho: torch.Tensor | None,
    ) -> Metrics:
        """Sums over main samples; policy: its terms per token; weights: the correction's: [N]."""
        main = tokens.column["main"]
        sums = {
            MetricSum.MAIN_TOKENS: main.sum(),
            MetricSum.ENTROPY: (main * tokens.entropy).sum(),
            MetricSum.CLIP_LOW: (main * policy.clipped_low).sum(),
            MetricSum.CLIP_HIGH: (main * policy.clipped_high).sum(),
            MetricSum.POLICY_KL: (main * (tokens.old_logprob - tokens.logprob)).sum(),
        }
        if self.correction.corrects:
            sums[MetricSum.CORRECTION] = (main * weights).sum()
            sums[MetricSum.CORRECTION_CUT] = (main * self.correction.cut(weights)).sum()
        if self.loss.kl_coef > 0:
            sums[MetricSum.KL] = (main * self._kl(tokens)).sum()
        if rho is not None:
            sums[MetricSum.RHO] = (main * rho).sum()
        return sums

    def _kl(self, tokens: Tokens) -> torch.Tensor:
        reference = tokens.column["reference_logprob"]
        return kl_to_reference(tokens.logprob, reference, self.loss.kl_estimator)

    @property
    def _token_clip(self) -> Clip:
        """The clip of AEPO's token ratios."""
        if self.loss.policy_loss.whole_sequences:
            return _TOKEN_CLIP
        return self.loss.clip_low, self.loss.clip_high


def _make_parts(loss: LossConfig, aepo: AepoConfig, context: StepContext) -> _Parts:
    correction = loss.importance_correction
    return _Parts(loss, aepo, context, correction, make_regulariser(loss), make_form(aepo))
