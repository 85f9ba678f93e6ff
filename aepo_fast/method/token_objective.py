"""The loss itself: policy loss, regularisers and AEPO's term, summed over tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.method import aepo_terms, policy_losses, regularisers, rivals
from aepo_fast.method.correction import bounds, token_correction
from aepo_fast.method.metric_sums import MetricSum

# AEPO's clip of token ratios, eps of arXiv 2510.08141, where loss.clip_low and clip_high bound
# those of whole sequences: tokens spread far wider, and most would lose their gradient.
_TOKEN_CLIP = (0.2, 0.2)

Columns = dict[str, torch.Tensor]
Metrics = dict[MetricSum, torch.Tensor]
TokenLoss = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, Columns], tuple[torch.Tensor, Metrics]
]
SequenceLoss = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, Columns],
    tuple[torch.Tensor, Metrics],
]


@dataclass(frozen=True)
class StepContext:
    """What the loss of a step depends on besides its rows.

    temperature: AEPO's T. bonus_coef: of the entropy bonus. dcpo_mix: share of AEPO's signal in
    DCPO's advantage. aux_draws, aux_positives: auxiliary rows of the step, and those with a
    gradient; its num_minibatches share them. lever: EntroPIC's a or REPO-R's zeta.
    """

    temperature: float
    bonus_coef: float
    dcpo_mix: float
    aux_draws: int
    aux_positives: int
    num_minibatches: int
    lever: float = 0.0
    entropy: float = 0.0  # the last one measured, nats


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
    one_pass = aepo.enabled and aepo.form == "one_pass"

    def token_loss(
        logprob: torch.Tensor,
        entropy: torch.Tensor,
        second_logprob: torch.Tensor | None,
        column: Columns,
    ) -> tuple[torch.Tensor, Metrics]:
        # Before the first update the current policy is the one that sampled: its ratio is 1.
        old = column.get("old_logprob", logprob.detach())
        at_t = None if loss.entropy_method == "era" else second_logprob
        rho = _rho(aepo, column, old, at_t)
        advantage = _advantage(loss, aepo, column, entropy, rho, context)
        advantage = rivals.token_advantage(loss, advantage, logprob, context.lever)
        scored = rivals.scored_logprobs(loss, column, logprob, old, second_logprob)
        terms = _policy_terms(loss, *scored, advantage, entropy, second_logprob, None)
        correction = _correction(loss, column, old)
        per_token = correction * _with_selection(loss, terms.loss, logprob, old, column)
        metrics = _metrics(column["main"], terms, entropy, old - logprob)
        metrics |= _correction_metrics(loss, column["main"], correction)
        if loss.kl_coef > 0:
            kl = policy_losses.kl_to_reference(
                logprob, column["reference_logprob"], loss.kl_estimator
            )
            per_token = per_token + loss.kl_coef * kl
            metrics[MetricSum.KL] = (column["main"] * kl).sum().detach()
        if context.bonus_coef:
            per_token = per_token - context.bonus_coef * entropy
        if one_pass:
            assert rho is not None
            extra = aepo_terms.one_pass_token_loss(
                logprob, old, rho, *_clip(loss), baseline=aepo.baseline
            )
            per_token = per_token + aepo.alpha * correction * column["positive"] * extra.loss
        heated = _heated(loss, aepo, context, logprob, entropy, second_logprob, old, column)
        if heated is not None:
            per_token = per_token + aepo.alpha * correction * heated
        if rho is not None:
            metrics[MetricSum.RHO] = (column["main"] * rho).sum()
        resampled, aux_metrics = _resampled(loss, logprob, old, column)
        return (column["weight"] * per_token).sum() + resampled, metrics | aux_metrics

    return token_loss


def make_sequence_loss(loss: LossConfig, aepo: AepoConfig, context: StepContext) -> SequenceLoss:
    """The loss over the rows of a micro-batch, with AEPO's term and the regularisers."""

    def sequence_loss(
        logprob: torch.Tensor,
        entropy: torch.Tensor,
        second_logprob: torch.Tensor | None,
        row_of_token: torch.Tensor,
        column: Columns,
    ) -> tuple[torch.Tensor, Metrics]:
        old = column.get("old_logprob", logprob.detach())
        terms = _policy_terms(
            loss, logprob, old, column["advantage"], entropy, second_logprob, row_of_token
        )
        # Columns are equal along a row, so a row's weight is the sum of its tokens' weights.
        correction = _correction(loss, column, old)
        weight = correction * column["weight"]
        row_weight = torch.zeros_like(terms.clipped_low).index_add(0, row_of_token, weight)
        total = (row_weight * terms.loss).sum()
        spread = policy_losses.TokenTerms(*(part[row_of_token] for part in terms))
        metrics = _metrics(column["main"], spread, entropy, old - logprob)
        metrics |= _correction_metrics(loss, column["main"], correction)
        if loss.kl_coef > 0:
            kl = policy_losses.kl_to_reference(
                logprob, column["reference_logprob"], loss.kl_estimator
            )
            total = total + loss.kl_coef * (column["weight"] * kl).sum()
            metrics[MetricSum.KL] = (column["main"] * kl).sum().detach()
        if context.bonus_coef:
            total = total - context.bonus_coef * (column["weight"] * entropy).sum()
        heated = _heated(loss, aepo, context, logprob, entropy, second_logprob, old, column)
        if heated is not None:
            total = total + aepo.alpha * (weight * heated).sum()
        resampled, aux_metrics = _resampled(loss, logprob, old, column)
        return total + resampled, metrics | aux_metrics

    return sequence_loss


def _policy_terms(
    loss: LossConfig,
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    entropy: torch.Tensor,
    second_logprob: torch.Tensor | None,
    row_of_token: torch.Tensor | None,
) -> policy_losses.TokenTerms:
    """The policy loss of tokens, [N], or with row_of_token of rows, [R]."""
    given = {
        "logprob": logprob,
        "old_logprob": old_logprob,
        "advantage": advantage,
        "entropy": entropy,
        "second_logprob": second_logprob,
        "clip_low": loss.clip_low,
        "clip_high": loss.clip_high,
        "dual_clip": loss.dual_clip,
        "row_of_token": row_of_token,
    }
    return loss.policy_loss.terms(given, loss.params)


def _clip(loss: LossConfig) -> tuple[float, float]:
    assert loss.clip_low is not None and loss.clip_high is not None
    return loss.clip_low, loss.clip_high


def _token_clip(loss: LossConfig) -> tuple[float, float]:
    """The clip of AEPO's token ratios."""
    return _TOKEN_CLIP if loss.policy_loss.whole_sequences else _clip(loss)


def _correction(loss: LossConfig, column: Columns, old: torch.Tensor) -> torch.Tensor:
    """Weights [N] of main rows for the sampler's law, one where it is off."""
    if "correction" in column:  # of whole sequences, known before the chunks
        return column["correction"]
    if loss.correction in (None, "off"):
        return torch.ones_like(old)
    return token_correction(loss, old, column["sampler_logprob"])


def _correction_metrics(loss: LossConfig, main: torch.Tensor, correction: torch.Tensor) -> Metrics:
    if loss.correction in (None, "off"):
        return {}
    cut = (correction <= 0) | (correction >= bounds(loss)[1])
    return {
        MetricSum.CORRECTION: (main * correction).sum(),
        MetricSum.CORRECTION_CUT: (main * cut).sum(),
    }


def _rho(
    aepo: AepoConfig, column: Columns, old: torch.Tensor, second_logprob: torch.Tensor | None
) -> torch.Tensor | None:
    if second_logprob is None or not aepo.enabled or aepo.form not in ("one_pass", "dcpo"):
        return None
    second = column.get("old_second_logprob", second_logprob.detach())
    return aepo_terms.temperature_ratio(second, old, aepo.rho_clip)


def _advantage(
    loss: LossConfig,
    aepo: AepoConfig,
    column: Columns,
    entropy: torch.Tensor,
    rho: torch.Tensor | None,
    context: StepContext,
) -> torch.Tensor:
    advantage = column["advantage"]
    if loss.entropy_method == "entropy_advantage":
        advantage = regularisers.entropy_advantage(
            advantage,
            entropy,
            coef=loss.advantage_entropy_coef,
            kappa=loss.advantage_entropy_kappa,
        )
    if rho is not None and aepo.form == "dcpo":
        advantage = aepo_terms.dcpo_advantage(advantage, rho, column["positive"], context.dcpo_mix)
    return advantage


def _with_selection(
    loss: LossConfig,
    per_token: torch.Tensor,
    logprob: torch.Tensor,
    old: torch.Tensor,
    column: Columns,
) -> torch.Tensor:
    """Apply the selection of the 80/20 rule, Clip-Cov or KL-Cov to the policy loss."""
    if loss.entropy_method == "top_entropy":
        return per_token * column["selected"]
    if loss.entropy_method == "clip_cov":
        return per_token * (1 - column["selected"])
    if loss.entropy_method == "kl_cov":
        return per_token + loss.kl_cov_coef * column["selected"] * (logprob - old).abs()
    return per_token


def _heated(
    loss: LossConfig,
    aepo: AepoConfig,
    context: StepContext,
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    second_logprob: torch.Tensor | None,
    old: torch.Tensor,
    column: Columns,
) -> torch.Tensor | None:
    """AEPO's term in the forms that vanish at T = 1, [N], or None where it does."""
    if not aepo.enabled or context.temperature == 1:
        return None
    low, high = _token_clip(loss)
    if aepo.form == "split":
        advantage = (context.temperature - 1) * column["surprise"]
        return policy_losses.clipped_surrogate(logprob, old, advantage, low, high).loss
    if aepo.form == "rescue":
        uncertain = entropy.detach() > context.entropy
        return -(context.temperature - 1) * column["solved"] * uncertain * entropy
    if aepo.form == "expected":
        assert second_logprob is not None
        # With several updates a state counts as often as the policy would now go on from there.
        ratio = policy_losses.probability_ratio(logprob, old).detach().clamp(1 - low, 1 + high)
        weight = column["positive"] * ratio
        return aepo_terms.expected_token_loss(logprob, second_logprob, context.temperature, weight)
    return None


def _resampled(
    loss: LossConfig, logprob: torch.Tensor, old: torch.Tensor, column: Columns
) -> tuple[torch.Tensor, Metrics]:
    """AEPO's resampling term over the auxiliary positives, and its clip count."""
    terms = aepo_terms.resample_token_loss(logprob, old, *_token_clip(loss))
    on_aux = (column["aux_weight"] > 0).float()
    metrics = {
        MetricSum.AUX_TOKENS: on_aux.sum(),
        MetricSum.AUX_CLIP: (on_aux * terms.clipped_high).sum(),
    }
    return (column["aux_weight"] * terms.loss).sum(), metrics


@torch.no_grad()
def _metrics(
    main: torch.Tensor,
    terms: policy_losses.TokenTerms,
    entropy: torch.Tensor,
    log_ratio: torch.Tensor,
) -> Metrics:
    return {
        MetricSum.MAIN_TOKENS: main.sum(),
        MetricSum.ENTROPY: (main * entropy).sum(),
        MetricSum.CLIP_LOW: (main * terms.clipped_low).sum(),
        MetricSum.CLIP_HIGH: (main * terms.clipped_high).sum(),
        MetricSum.POLICY_KL: (main * log_ratio).sum(),
    }
