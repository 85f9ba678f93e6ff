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
from aepo_fast.method.credit import token_weights
from aepo_fast.method.forms import make_form
from aepo_fast.method.rivals import make_regulariser
from aepo_fast.method.token_objective import (
    SequenceLoss,
    TokenLoss,
    make_sequence_loss,
    make_token_loss,
)
from aepo_fast.method.tokens import Columns, StepContext
from aepo_fast.samples import Sample, TokenValues, token_index, token_offsets


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
    whole = make_regulariser(loss).needs_scores or loss.importance_correction.needs_old_logprobs
    return num_updates > 1 or whole


def second_temperature(loss: LossConfig, aepo: AepoConfig, temperature: float) -> float | None:
    """The temperature of the second log-prob, None where the loss needs none.

    It is AEPO's T in the forms that score twice, unless the entropy method takes one of its own,
    which it does beside none of these forms.
    """
    own = make_regulariser(loss).second_temperature()
    return make_form(aepo).second_temperature(temperature) if own is None else own


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
    per_row |= make_regulariser(loss).row_columns(rows, per_row, scores)
    columns = {name: values.repeat_interleave(lengths) for name, values in per_row.items()}
    columns |= loss.importance_correction.columns(rows, scores)
    if scores is not None:
        columns |= _scored_columns(loss, rows, columns, minibatch, scores, generator)
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


def _scored_columns(
    loss: LossConfig,
    rows: Sequence[Sample],
    columns: Columns,
    minibatch: Sequence[int],
    scores: TokenValues,
    generator: torch.Generator,
) -> Columns:
    """The columns that the log-probs and entropies of the policy that sampled give."""
    scored = {"old_logprob": scores.logprob}
    if scores.second_logprob is not None:
        scored["old_second_logprob"] = scores.second_logprob
    index = token_index(token_offsets(rows), minibatch)
    main = index[columns["main"][index] > 0]
    selected = make_regulariser(loss).select(scores, columns["advantage"], main, generator)
    if selected is not None:
        scored["selected"] = torch.zeros(len(columns["main"]))
        scored["selected"][main] = selected.float()
    return scored


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
        cfg.loss.aggregation,
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
    return columns | make_form(cfg.aepo).row_columns(rows, main, main & positive)


def _passive_rows(
    cfg: Config,
    per_row: dict[str, torch.Tensor],
    minibatch: Sequence[int],
    context: StepContext,
) -> frozenset[int]:
    """Rows whose coefficients are zero whatever the model says, hence need no backward pass."""
    active = (per_row["weight"] * per_row["advantage"] != 0) | (per_row["aux_weight"] != 0)
    loss = cfg.loss
    acts_everywhere = make_regulariser(loss).all_rows_active or not loss.policy_loss.needs_advantage
    if loss.kl_coef > 0 or acts_everywhere:
        active |= per_row["main"] > 0
    active |= make_form(cfg.aepo).active_rows(per_row, context.temperature)
    return frozenset(index for index in minibatch if not active[index])
