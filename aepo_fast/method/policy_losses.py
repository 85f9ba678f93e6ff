"""Policy losses on token vectors: what each one minimises before aggregation, and their table.

A loss is a function that names the arguments it wants (`GIVEN`). Every loss of single tokens is
elementwise over its [N] arguments, so it may be computed chunk by chunk. A loss that names
`sample_of_token` weighs whole sequences and is called on whole samples. Log-probs are in nats at
temperature 1; old log-probs and advantages carry no gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from aepo_fast.method.credit import Advantage, Aggregation

# What the trainer gives to a loss that names it; any other argument is one of the loss's own.
GIVEN = (
    "logprob",
    "old_logprob",
    "advantage",
    "entropy",
    "second_logprob",
    "clip_low",
    "clip_high",
    "dual_clip",
    "sample_of_token",
)

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


def sapo(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> torch.Tensor:
    """SAPO: -f(r) A with f(r) = sigmoid(tau (r - 1)) * 4 / tau, per token: [N].

    Soft Adaptive Policy Optimization, arXiv 2511.20347, whose temperatures are the defaults:
    tau_pos for A >= 0, tau_neg for A < 0. The slope f' is 1 at r = 1 and fades on both sides: a
    soft gate in place of the clip.
    """
    ratio = probability_ratio(logprob, old_logprob)
    tau = torch.where(advantage >= 0, tau_pos, tau_neg).to(ratio.dtype)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage


def sequence_means(
    values: torch.Tensor, sample_of_token: torch.Tensor, num_samples: int
) -> torch.Tensor:
    """Mean of [N] token values over the tokens of each sample: [R]; 0 where there are none."""
    zeros = values.new_zeros(num_samples)
    counts = zeros.index_add(0, sample_of_token, torch.ones_like(values))
    return zeros.index_add(0, sample_of_token, values) / counts.clamp(min=1)


def gspo(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    clip_low: float,
    clip_high: float,
    sample_of_token: torch.Tensor,
) -> TokenTerms:
    """GSPO: -min(s A, clip(s) A) per sequence, s = exp(mean_t log r_t) (arXiv 2507.18071).

    logprob, old_logprob, advantage (equal along a sample), sample_of_token: [N]. Returns terms,
    [R].
    """
    num_samples = int(sample_of_token[-1]) + 1
    mean_logprob = sequence_means(logprob, sample_of_token, num_samples)
    mean_old = sequence_means(old_logprob, sample_of_token, num_samples)
    mean_advantage = sequence_means(advantage, sample_of_token, num_samples)
    return clipped_surrogate(mean_logprob, mean_old, mean_advantage, clip_low, clip_high)


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


LossFunction = Callable[..., torch.Tensor | TokenTerms]


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss: its function, and what a run uses with it unless the run says otherwise.

    needs_advantage: the loss has no gradient where the advantage is 0, so such samples need no
    backward pass.
    """

    name: str
    function: LossFunction
    advantage: Advantage = "group_norm"
    aggregation: Aggregation = "token_mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    needs_advantage: bool = True

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The arguments that the function names."""
        return inspect.signature(self.function).parameters

    def takes(self, argument: str) -> bool:
        """Whether the function names `argument`."""
        return argument in self.parameters

    @property
    def whole_sequences(self) -> bool:
        """Whether it gives one loss per sample, [R], and not one per token, [N]."""
        return self.takes("sample_of_token")

    @property
    def own_arguments(self) -> tuple[str, ...]:
        """The arguments that `[loss.params]` fills."""
        return tuple(name for name in self.parameters if name not in GIVEN)

    def terms(self, given: Mapping[str, Any], params: Mapping[str, Any]) -> TokenTerms:
        """The loss, [N] or [R], with zeros for the clip flags of a loss that reports none.

        given: values of the names in GIVEN; only those that the function names are passed on.
        """
        wanted = {name: given[name] for name in self.parameters if name in GIVEN}
        result = self.function(**wanted, **params)
        if isinstance(result, TokenTerms):
            return result
        unclipped = torch.zeros_like(result.detach())
        return TokenTerms(result, unclipped, unclipped)


_TABLE = (
    PolicyLoss("grpo", clipped_surrogate, aggregation="sequence_mean"),
    PolicyLoss("dr_grpo", clipped_surrogate, "group_mean", "constant_length"),
    PolicyLoss("dapo", clipped_surrogate, clip_high=0.28),
    PolicyLoss("cispo", cispo, clip_high=0.28),
    PolicyLoss("gspo", gspo, aggregation="sequence_mean", clip_low=3e-4, clip_high=4e-4),
    PolicyLoss("sapo", sapo, aggregation="sequence_mean"),
)
POLICY_LOSSES = {loss.name: loss for loss in _TABLE}
