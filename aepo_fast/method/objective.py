"""The loss of a minibatch as per-token columns plus a loss over them.

What needs the whole batch (advantages, denominators, selections) becomes a column here. The loss
itself, in `token_objective`, is then additive over tokens, as `linear_token_loss` asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.config.sections import Config
from aepo_fast.method import aepo_terms, regularisers, rivals
from aepo_fast.method.correction import sequence_correction
from aepo_fast.method.credit import token_weights
from aepo_fast.method.token_objective import (
    SequenceLoss,
    StepContext,
    TokenLoss,
    make_sequence_loss,
    make_token_loss,
)
from aepo_fast.samples import Sample, TokenValues, sampler_logprobs, token_index, token_offsets

_MOST_SURPRISE = 8.0  # nats of a token


@dataclass(frozen=True)
class Objective:
    """A minibatch's loss.

    columns: name -> [total tokens of the step]; the losses take them by name.
    sequence_loss: replaces token_loss for losses over whole sequences. passive_rows: rows without
    a gradient, which are only measured.
    """

    columns: dict[str, torch.Tensor]
    token_loss: TokenLoss
    sequence_loss: SequenceLoss | None
    second_temperature: float | None
    passive_rows: frozenset[int]


def needs_scores(loss: LossConfig, num_updates: int) -> bool:
    """Whether log-probs before the first update are needed: several updates, or whole sequences."""
    selects = loss.entropy_method in (
        "top_entropy",
        "clip_cov",
        "kl_cov",
        *rivals.ROW_METHODS,
    )
    return num_updates > 1 or selects or loss.correction == "sequence_mask"


def second_temperature(loss: LossConfig, aepo: AepoConfig, temperature: float) -> float | None:
    """The temperature of the second log-prob, None where the loss needs none.

    It is AEPO's T in the forms that score twice; at T = 1 the expected form is zero. ERA scores at
    logits times its scale, and goes with none of these forms.
    """
    if loss.entropy_method == "era":
        return 1 / loss.era_scale
    if not aepo.enabled or aepo.form in ("resample", "split", "rescue"):
        return None
    return None if aepo.form == "expected" and temperature == 1 else temperature


def is_positive(row: Sample, aepo: AepoConfig) -> bool:
    """Whether a row counts as positive: by its answer's reward, not by length or advantage."""
    return row.task_reward is not None and row.task_reward >= aepo.reward_threshold


def build_objective(
    cfg: Config,
    rows: Sequence[Sample],
    advantages: torch.Tensor,
    minibatch: Sequence[int],
    context: StepContext,
    *,
    scores: TokenValues | None,
    reference: TokenValues | None,
    generator: torch.Generator,
) -> Objective:
    """The objective of rows[minibatch], normalised over that minibatch's main rows.

    advantages: [R]. scores: of the weights that sampled, None while they are the current ones.
    reference: of the KL reference. generator: for Clip-Cov's random choice.
    """
    loss, aepo = cfg.loss, cfg.aepo
    lengths = torch.tensor([row.length for row in rows])
    per_row = _row_columns(cfg, rows, lengths, advantages, minibatch, context)
    per_row |= rivals.row_columns(loss, rows, per_row, scores)
    columns = {name: values.repeat_interleave(lengths) for name, values in per_row.items()}
    if loss.correction not in (None, "off"):
        columns["sampler_logprob"] = sampler_logprobs(rows)
    if scores is not None:
        columns["old_logprob"] = scores.logprob
        if loss.correction == "sequence_mask":
            sampled = columns.pop("sampler_logprob")
            columns["correction"] = sequence_correction(loss, scores.logprob, sampled, lengths)
        if scores.second_logprob is not None:
            columns["old_second_logprob"] = scores.second_logprob
        index = token_index(token_offsets(rows), minibatch)
        main = index[columns["main"][index] > 0]
        selected = _select(loss, scores, columns["advantage"], main, generator)
        if selected is not None:
            columns["selected"] = torch.zeros(len(columns["main"]))
            columns["selected"][main] = selected.float()
    if reference is not None:
        columns["reference_logprob"] = reference.logprob
    whole = loss.policy_loss.whole_sequences
    return Objective(
        columns=columns,
        token_loss=make_token_loss(loss, aepo, context),
        sequence_loss=make_sequence_loss(loss, aepo, context) if whole else None,
        second_temperature=second_temperature(loss, aepo, context.temperature),
        passive_rows=_passive_rows(cfg, per_row, minibatch, context),
    )


def _row_columns(
    cfg: Config,
    rows: Sequence[Sample],
    lengths: torch.Tensor,
    advantages: torch.Tensor,
    minibatch: Sequence[int],
    context: StepContext,
) -> dict[str, torch.Tensor]:
    inside = torch.zeros(len(rows), dtype=torch.bool)
    inside[torch.tensor(list(minibatch), dtype=torch.long)] = True
    aux = torch.tensor([row.is_aux for row in rows])
    main = inside & ~aux
    positive = torch.tensor([is_positive(row, cfg.aepo) for row in rows])
    weight = torch.zeros(len(rows))
    weight[main] = token_weights(
        lengths[main],
        str(cfg.loss.aggregation),
        max_length=cfg.rollout.max_new_tokens,
        num_rows_total=int(main.sum()),
        num_tokens_total=int(lengths[main].sum()),
    )
    aux_weight = torch.zeros(len(rows))
    counted = context.aux_draws if cfg.aepo.normalizer == "draws" else context.aux_positives
    if counted:
        # Each of the step's minibatches takes its share of the draws.
        share = cfg.aepo.alpha * context.num_minibatches / counted
        chosen = inside & aux & positive
        aux_weight[chosen] = share / lengths[chosen].clamp(min=1)
    columns = {
        "weight": weight,
        "aux_weight": aux_weight,
        "advantage": advantages,
        "main": main.float(),
        "positive": (main & positive).float(),
    }
    if cfg.aepo.enabled and cfg.aepo.form == "split":
        columns["surprise"] = _surprise(rows, main & positive)
    if cfg.aepo.enabled and cfg.aepo.form == "rescue":
        groups = torch.tensor([row.group for row in rows])
        unsolved = groups[main & ~positive].unique()
        columns["solved"] = (main & ~torch.isin(groups, unsolved)).float()
    return columns


def _surprise(rows: Sequence[Sample], correct: torch.Tensor) -> torch.Tensor:
    """Surprise weights of the correct samples within their groups, 0 for all others: [R].

    From the sampler's log-probs, which are those of the policy before the step's updates. A token
    counts no more than _MOST_SURPRISE: one odd token does not make a sample a new answer.
    """
    weights = torch.zeros(len(rows))
    groups = torch.tensor([row.group for row in rows])
    for group in groups[correct].unique():
        members = (correct & (groups == group)).nonzero().flatten()
        logprobs = [torch.tensor(rows[int(i)].completion.logprobs) for i in members]
        surprise = torch.stack([(-lp).clamp(max=_MOST_SURPRISE).mean() for lp in logprobs])
        weights[members] = aepo_terms.surprise_weights(surprise)
    return weights


def _select(
    loss: LossConfig,
    scores: TokenValues,
    advantage: torch.Tensor,
    main: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor | None:
    if loss.entropy_method == "top_entropy":
        return regularisers.top_entropy_mask(scores.entropy[main], loss.top_entropy_fraction)
    if loss.entropy_method == "clip_cov":
        return regularisers.clip_cov_mask(
            scores.logprob[main],
            advantage[main],
            fraction=loss.cov_fraction,
            low=loss.clip_cov_low,
            high=loss.clip_cov_high,
            generator=generator,
        )
    if loss.entropy_method == "kl_cov":
        return regularisers.kl_cov_mask(
            scores.logprob[main], advantage[main], fraction=loss.cov_fraction
        )
    return None


def _passive_rows(
    cfg: Config,
    per_row: dict[str, torch.Tensor],
    minibatch: Sequence[int],
    context: StepContext,
) -> frozenset[int]:
    """Rows whose coefficients are zero whatever the model says, hence need no backward pass."""
    active = (per_row["weight"] * per_row["advantage"] != 0) | (per_row["aux_weight"] != 0)
    if cfg.loss.kl_coef > 0 or cfg.loss.entropy_method in ("bonus", "adaptive_bonus", "kl_cov"):
        active |= per_row["main"] > 0
    if not cfg.loss.policy_loss.needs_advantage:
        active |= per_row["main"] > 0
    aepo, heated = cfg.aepo, context.temperature != 1
    if aepo.enabled and (aepo.form in ("one_pass", "dcpo") or aepo.form == "expected" and heated):
        active |= per_row["positive"] > 0
    if aepo.enabled and aepo.form == "split" and heated:
        active |= per_row["surprise"] != 0
    if aepo.enabled and aepo.form == "rescue" and heated:
        active |= per_row["solved"] != 0
    return frozenset(index for index in minibatch if not active[index])
