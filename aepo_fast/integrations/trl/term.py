"""AEPO's part of the loss of one of TRL's micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from aepo_fast.config.method import AepoConfig
from aepo_fast.integrations.terms import token_terms
from aepo_fast.method.credit import Aggregation
from aepo_fast.method.forms import AepoForm, Clip

# Names in TRL's batch, [B] each but for the last, [B, C]: whether a sample is correct, the index of
# its prompt, and the log-probs at T of the policy that sampled.
POSITIVE, PROMPT, OLD_SECOND_LOGPROB = "aepo_positive", "aepo_prompt", "aepo_old_second_logps"


@dataclass(frozen=True)
class Batching:
    """How TRL splits an update: what divides its policy loss. accumulated: micro-batches."""

    aggregation: Aggregation
    max_length: int
    accumulated: int
    steps_per_generation: int
    num_processes: int


def loss_mask(inputs: Mapping[str, Tensor]) -> Tensor:
    """1 for tokens that learn, [B, C]: those that the policy sampled, without what tools said."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def token_weights(inputs: Mapping[str, Tensor], batching: Batching) -> Tensor:
    """Weight of every token in TRL's policy loss, [B, C]; 0 where it does not learn.

    TRL adds up micro-batches and takes the mean over ranks, so over an update they are those of
    `credit.token_weights`. With several updates a rollout, TRL's token_mean divides by the mean
    number of tokens of an update, where ours takes each one's own number.
    """
    mask = loss_mask(inputs).float()
    if batching.aggregation == "sequence_mean":
        lengths = mask.sum(-1, keepdim=True).clamp(min=1)
        return mask / lengths / len(mask) / batching.accumulated
    if batching.aggregation == "constant_length":
        return mask / (len(mask) * batching.max_length * batching.accumulated)
    tokens = inputs["num_items_in_batch"].clamp(min=1) / batching.num_processes
    return mask / (tokens * batching.accumulated / batching.steps_per_generation)


def aepo_term(
    form: AepoForm,
    aepo: AepoConfig,
    inputs: Mapping[str, Tensor],
    weights: Tensor,
    *,
    logprob: Tensor,
    entropy: Tensor,
    second_logprob: Tensor | None,
    temperature: float,
    clip: Clip,
) -> tuple[Tensor | None, Tensor | None]:
    """AEPO's part of a micro-batch's loss, and rho of its tokens: each None where there is none.

    inputs: TRL's batch. weights: of its tokens. logprob, entropy, second_logprob: at temperature 1
    and at T, differentiable; all [B, C]. temperature: T. As in `method`, the term is corrected for
    the sampler's law where TRL's policy loss is.
    """
    learns = loss_mask(inputs).bool()
    old = inputs.get("old_per_token_logps", logprob.detach())
    old_second = inputs.get(OLD_SECOND_LOGPROB)
    term, rho = token_terms(
        form,
        logprob=logprob[learns],
        old_logprob=old[learns],
        entropy=entropy[learns],
        second_logprob=None if second_logprob is None else second_logprob[learns],
        old_second_logprob=None if old_second is None else old_second[learns],
        positive=inputs[POSITIVE].unsqueeze(1).expand_as(logprob)[learns],
        temperature=temperature,
        clip=clip,
    )
    if term is None:
        return None, rho
    if "importance_sampling_ratio" in inputs:
        weights = weights * inputs["importance_sampling_ratio"]
    return aepo.alpha * (weights[learns] * term).sum(), rho
