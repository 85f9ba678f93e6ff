"""The loss of a minibatch as per-token columns plus a loss over them.

What needs the whole batch (advantages, denominators, selections) becomes a column here. The loss
itself, in `token_objective`, is then additive over tokens, as `linear_token_loss` asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aepo_fast import entropy_losses
from aepo_fast.aggregation import token_weights
from aepo_fast.batch import Row, sampler_logprobs
from aepo_fast.config import AepoConfig, Config, LossConfig
from aepo_fast.correction import sequence_correction
from aepo_fast.policy import Scores, token_index, token_offsets
from aepo_fast.token_objective import (
    SequenceLoss,
    StepContext,
    TokenLoss,
    make_sequence_loss,
    make_token_loss,
)


@dataclass(frozen=True)
class Objective:
    """A minibatch's loss.

    columns: name -> [total tokens of the step], in the order in which the losses take them.
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
    selects = loss.entropy_method in ("top_entropy", "clip_cov", "kl_cov")
    return num_updates > 1 or selects or loss.correction == "sequence_mask"


def second_temperature(aepo: AepoConfig, temperature: float) -> float | None:
    """The temperature of the second log-prob: AEPO's T in the forms without a second sampling."""
    return temperature if aepo.enabled and aepo.form != "resample" else None


def is_positive(row: Row, aepo: AepoConfig) -> bool:
    """Whether a row counts as positive: by its answer's reward, not by length or advantage."""
    return row.task_reward is not None and row.task_reward >= aepo.reward_threshold


def build_objective(
    cfg: Config,
    rows: Sequence[Row],
    advantages: torch.Tensor,
    minibatch: Sequence[int],
    context: StepContext,
    *,
    scores: Scores | None,
    reference: Scores | None,
    generator: torch.Generator,
) -> Objective:
    """The objective of rows[minibatch], normalised over that minibatch's main rows.

    advantages: [R]. scores: of the weights that sampled, None while they are the current ones.
    reference: of the KL reference. generator: for Clip-Cov's random choice.
    """
    loss, aepo = cfg.loss, cfg.aepo
    lengths = torch.tensor([row.length for row in rows])
    per_row = _row_columns(cfg, rows, lengths, advantages, minibatch, context)
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
    names = tuple(columns)
    return Objective(
        columns=columns,
        token_loss=make_token_loss(loss, aepo, names, context),
        sequence_loss=make_sequence_loss(loss, context) if loss.policy == "gspo" else None,
        second_temperature=second_temperature(aepo, context.temperature),
        passive_rows=_passive_rows(cfg, per_row, minibatch),
    )


def _row_columns(
    cfg: Config,
    rows: Sequence[Row],
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
    return {
        "weight": weight,
        "aux_weight": aux_weight,
        "advantage": advantages,
        "main": main.float(),
        "positive": (main & positive).float(),
    }


def _select(
    loss: LossConfig,
    scores: Scores,
    advantage: torch.Tensor,
    main: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor | None:
    if loss.entropy_method == "top_entropy":
        return entropy_losses.top_entropy_mask(scores.entropy[main], loss.top_entropy_fraction)
    if loss.entropy_method == "clip_cov":
        return entropy_losses.clip_cov_mask(
            scores.logprob[main],
            advantage[main],
            fraction=loss.cov_fraction,
            low=loss.clip_cov_low,
            high=loss.clip_cov_high,
            generator=generator,
        )
    if loss.entropy_method == "kl_cov":
        return entropy_losses.kl_cov_mask(
            scores.logprob[main], advantage[main], fraction=loss.cov_fraction
        )
    return None


def _passive_rows(
    cfg: Config, per_row: dict[str, torch.Tensor], minibatch: Sequence[int]
) -> frozenset[int]:
    """Rows whose coefficients are zero whatever the model says, hence need no backward pass."""
    active = (per_row["weight"] * per_row["advantage"] != 0) | (per_row["aux_weight"] != 0)
    if cfg.loss.kl_coef > 0 or cfg.loss.entropy_method in ("bonus", "adaptive_bonus", "kl_cov"):
        active |= per_row["main"] > 0
    if cfg.aepo.enabled and cfg.aepo.form != "resample":
        active |= per_row["positive"] > 0
    return frozenset(index for index in minibatch if not active[index])
