"""The loss of a minibatch as per-token columns plus a loss over them.

What needs the whole batch (advantages, denominators, selections) becomes a column here. The loss
itself, in `token_objective`, is then additive over tokens, as `linear_token_loss` asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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
    sequence_loss: replaces token_loss for losses over whole sequences. passive_samples: those
    without a gradient, which are only measured. differentiates_entropy: the loss has a gradient by
    the entropy, as far as its settings say.
    """

    columns: dict[str, torch.Tensor]
    token_loss: TokenLoss
    sequence_loss: SequenceLoss | None
    second_temperature: float | None
    passive_samples: frozenset[int]
    differentiates_entropy: bool

    def times_zero(self) -> Objective:
        """The same without an effect: loss and gradients are zero wherever they are finite."""

        def without_effect(loss: Any) -> Any:
            return lambda *args: (0 * loss(*args)[0], {})

        whole = self.sequence_loss
        return replace(
            self,
            token_loss=without_effect(self.token_loss),
            sequence_loss=None if whole is None else without_effect(whole),
        )


def needs_old_logprobs(loss: LossConfig, num_updates: int) -> bool:
    """Whether log-probs before the first update are needed: several updates, or whole sequences."""
    parts = make_regulariser(loss), loss.importance_correction
    return num_updates > 1 or any(part.needs_old_logprobs for part in parts)


def second_temperature(loss: LossConfig, aepo: AepoConfig, temperature: float) -> float | None:
    """The temperature of the second log-prob, None where the loss needs none.

    It is AEPO's T in the forms that take two log-probs, unless the entropy method has one of its
    own, which it has beside none of these forms.
    """
    own = make_regulariser(loss).second_temperature()
    return make_form(aepo).second_temperature(temperature) if own is None else own


def is_positive(sample: Sample, aepo: AepoConfig) -> bool:
    """Whether a sample counts as positive: by its answer's reward, not by length or advantage."""
    return sample.task_reward is not None and sample.task_reward >= aepo.reward_threshold


def build_objective(
    cfg: Config,
    samples: Sequence[Sample],
    advantages: torch.Tensor,
    minibatch: Sequence[int],
    context: StepContext,
    *,
    old: TokenValues | None,
    reference: TokenValues | None,
    generator: torch.Generator,
) -> Objective:
    """The objective of samples[minibatch], normalised over that minibatch's main samples.

    advantages: [R]. old: of the weights that sampled, None while they are the current ones.
    reference: of the KL reference. generator: for Clip-Cov's random choice.
    """
    loss, aepo = cfg.loss, cfg.aepo
    lengths = torch.tensor([sample.length for sample in samples])
    per_sample = _sample_columns(cfg, samples, lengths, advantages, minibatch, context)
    per_sample |= make_regulariser(loss).sample_columns(samples, per_sample, old)
    columns = {name: values.repeat_interleave(lengths) for name, values in per_sample.items()}
    columns |= loss.importance_correction.columns(samples, old)
    if old is not None:
        columns |= _old_columns(loss, samples, columns, minibatch, old, generator)
    if reference is not None:
        columns["reference_logprob"] = reference.logprob
    whole = loss.policy_loss.whole_sequences
    return Objective(
        columns=columns,
        token_loss=make_token_loss(loss, aepo, context),
        sequence_loss=make_sequence_loss(loss, aepo, context) if whole else None,
        second_temperature=second_temperature(loss, aepo, context.temperature),
        passive_samples=_passive_samples(cfg, per_sample, minibatch, context),
        differentiates_entropy=bool(context.bonus_coef),
    )


def _old_columns(
    loss: LossConfig,
    samples: Sequence[Sample],
    columns: Columns,
    minibatch: Sequence[int],
    old: TokenValues,
    generator: torch.Generator,
) -> Columns:
    """The columns that the log-probs and entropies of the policy that sampled give."""
    found = {"old_logprob": old.logprob}
    if old.second_logprob is not None:
        found["old_second_logprob"] = old.second_logprob
    index = token_index(token_offsets(samples), minibatch)
    main = index[columns["main"][index] > 0]
    selected = make_regulariser(loss).select(old, columns["advantage"], main, generator)
    if selected is not None:
        found["selected"] = torch.zeros(len(columns["main"]))
        found["selected"][main] = selected.float()
    return found


def _sample_columns(
    cfg: Config,
    samples: Sequence[Sample],
    lengths: torch.Tensor,
    advantages: torch.Tensor,
    minibatch: Sequence[int],
    context: StepContext,
) -> dict[str, torch.Tensor]:
    inside = torch.zeros(len(samples), dtype=torch.bool)
    inside[torch.tensor(list(minibatch), dtype=torch.long)] = True
    aux = torch.tensor([sample.is_aux for sample in samples])
    main = inside & ~aux
    positive = torch.tensor([is_positive(sample, cfg.aepo) for sample in samples])
    weight = torch.zeros(len(samples))
    weight[main] = token_weights(
        lengths[main],
        cfg.loss.aggregation,
        max_length=cfg.rollout.max_new_tokens,
        num_samples_total=int(main.sum()),
        num_tokens_total=int(lengths[main].sum()),
    )
    aux_weight = torch.zeros(len(samples))
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


def _passive_samples(
    cfg: Config,
    per_sample: dict[str, torch.Tensor],
    minibatch: Sequence[int],
    context: StepContext,
) -> frozenset[int]:
    """Samples whose coefficients are zero whatever the model says, hence need no backward pass."""
    active = (per_sample["weight"] * per_sample["advantage"] != 0) | (per_sample["aux_weight"] != 0)
    loss = cfg.loss
    acts_everywhere = (
        loss.kl_coef > 0
        or make_regulariser(loss).all_samples_active
        or not loss.policy_loss.needs_advantage
    )
    if acts_everywhere:
        active |= per_sample["main"] > 0
    active |= make_form(cfg.aepo).active_samples(per_sample, context.temperature)
    return frozenset(index for index in minibatch if not active[index])
