"""Policy losses on token vectors: what each method minimises per token, before aggregation.

Every function is elementwise over its [N] arguments, so a loss may be computed chunk by chunk.
Log-probs are in nats at temperature 1; old log-probs and advantages carry no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# exp of a larger log-ratio would overflow fp32 before the clip can act.
MAX_LOG_RATIO = 20.0


class TokenTerms(NamedTuple):
    """Per-token loss [N] and where its gradient was clipped away from below or above."""

    loss: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor


def probability_ratio(logprob: torch.Tensor, old_logprob: torch.Tensor) -> torch.Tensor:
    """pi / pi_old per token, [N], with the log-ratio bounded so that it cannot overflow."""
    return (logprob - old_logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_surrogate(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    clip_low: float,
    clip_high: float,
    *,
    dual_clip: float = 0.0,
) -> TokenTerms:
    """PPO's loss -min(r A, clip(r, 1 - low, 1 + high) A), as in GRPO, Dr.GRPO and DAPO.

    Sources: PPO arXiv 1707.06347; GRPO 2402.03300; asymmetric clip DAPO 2503.14476; dual clip
    1912.09729: for A < 0 the loss is at most -dual_clip * A. dual_clip = 0 switches that off.
    """
    ratio = probability_ratio(logprob, old_logprob)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    if dual_clip:
        bounded = torch.maximum(objective, dual_clip * advantage)
        objective = torch.where(advantage < 0, bounded, objective)
    low = (ratio < 1 - clip_low) & (advantage < 0)
    high = (ratio > 1 + clip_high) & (advantage > 0)
    return TokenTerms(-objective, low.float(), high.float())


def cispo(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> TokenTerms:
    """CISPO: -sg(clip(r, 1 - low, 1 + high)) A log pi (MiniMax-M1, arXiv 2506.13585).

    No token loses its gradient; the clipped ratio only bounds its weight.
    """
    ratio = probability_ratio(logprob, old_logprob).detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    low, high = ratio < 1 - clip_low, ratio > 1 + clip_high
    return TokenTerms(-weight * advantage * logprob, low.float(), high.float())


def policy_token_loss(
    policy: str,
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    clip_low: float,
    clip_high: float,
    *,
    dual_clip: float,
) -> TokenTerms:
    """The token-level loss named by LossConfig.policy; "gspo" has `gspo_loss` instead."""
    if policy == "cispo":
        return cispo(logprob, old_logprob, advantage, clip_low, clip_high)
    return clipped_surrogate(
        logprob, old_logprob, advantage, clip_low, clip_high, dual_clip=dual_clip
    )


def sequence_means(values: torch.Tensor, row_of_token: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Mean of [N] token values over the tokens of each row: [R]; 0 for a row without tokens."""
    zeros = values.new_zeros(num_rows)
    counts = zeros.index_add(0, row_of_token, torch.ones_like(values))
    return zeros.index_add(0, row_of_token, values) / counts.clamp(min=1)


def gspo_loss(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    row_of_token: torch.Tensor,
    advantage: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> TokenTerms:
    """GSPO: -min(s A, clip(s) A) per sequence, s = exp(mean_t log r_t) (arXiv 2507.18071).

    logprob, old_logprob, row_of_token: [N]. advantage: [R]. Returns terms of [R].
    """
    mean_logprob = sequence_means(logprob, row_of_token, len(advantage))
    mean_old = sequence_means(old_logprob, row_of_token, len(advantage))
    return clipped_surrogate(mean_logprob, mean_old, advantage, clip_low, clip_high)


def kl_to_reference(
    logprob: torch.Tensor, reference_logprob: torch.Tensor, estimator: str
) -> torch.Tensor:
    """Per-token estimate of KL(pi || pi_ref), [N] (Schulman, "Approximating KL divergence").

    With d = log pi_ref - log pi: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1.
    """
    difference = reference_logprob - logprob
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() - difference - 1
