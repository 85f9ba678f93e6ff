"""Importance correction: weights for samples whose distribution is not quite the trainer's.

The sampler rounds otherwise than the trainer and may hold older weights. With
k = pi_trainer / pi_sampler, both at temperature 1, the policy loss of main samples is weighted by

- token_truncate: min(k_t, high), the truncated importance sampling of Yao et al., "Your Efficient
  RL Framework Secretly Brings You Off-Policy RL Training" (2025);
- icepop: k_t where low <= k_t <= high, else 0 (arXiv 2510.18855);
- sequence_mask: K where low <= K <= high, else 0, with K the product of k_t over the completion.

Auxiliary samples are never weighted: it would restore the distribution at temperature 1, whose
difference from the sampled one is their whole point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from aepo_fast.method.policy_losses import probability_ratio
from aepo_fast.method.tokens import Columns, Tokens
from aepo_fast.samples import Sample, TokenValues, sampler_logprobs


class Correction:
    """What a correction does to the loss of main samples: by itself, and as "off", nothing.

    low, high: bounds of the ratio; None takes those that the correction has by default.
    """

    default_low, default_high = 0.0, 1.0
    reads_low = reads_high = False  # which of the bounds it reads
    corrects = False  # whether it changes anything
    per_token = False  # it weighs single tokens, which a loss over whole sequences has not
    needs_old_logprobs = False  # of whole samples, before the first update

    def __init__(self, low: float | None = None, high: float | None = None) -> None:
        self.low = self.default_low if low is None else low
        self.high = self.default_high if high is None else high

    def columns(self, samples: Sequence[Sample], old: TokenValues | None) -> Columns:
        """Columns that its weights are made of, [total tokens] each.

        old: of the policy that sampled, there with `needs_old_logprobs`.
        """
        return {}

    def weights(self, tokens: Tokens) -> torch.Tensor:
        """Weights of main samples' tokens, [N], without a gradient."""
        return torch.ones_like(tokens.old_logprob)

    def cut(self, weights: torch.Tensor) -> torch.Tensor:
        """Bool [N]: where a weight is at its upper bound or zero."""
        return (weights <= 0) | (weights >= self.high)


class _PerToken(Correction):
    """Weights of tokens by their own ratio."""

    reads_high = corrects = per_token = True

    def columns(self, samples: Sequence[Sample], old: TokenValues | None) -> Columns:
        """The sampler's log-probs."""
        return {"sampler_logprob": sampler_logprobs(samples)}

    def weights(self, tokens: Tokens) -> torch.Tensor:
        """The bounded ratio."""
        sampler_logprob = tokens.column["sampler_logprob"]
        return self.bounded(probability_ratio(tokens.old_logprob.detach(), sampler_logprob))

    def bounded(self, ratio: torch.Tensor) -> torch.Tensor:
        """The weight of a ratio k_t, [N]."""
        raise NotImplementedError


class TokenTruncate(_PerToken):
    """min(k_t, high)."""

    default_high = 2.0

    def bounded(self, ratio: torch.Tensor) -> torch.Tensor:
        """The smaller of the two."""
        return ratio.clamp(max=self.high)


class SequenceMask(Correction):
    """K of the whole completion for each of its tokens, 0 beyond the bounds."""

    default_high = 3.0
    reads_low = reads_high = corrects = needs_old_logprobs = True

    def columns(self, samples: Sequence[Sample], old: TokenValues | None) -> Columns:
        """The weights themselves: a sequence's ratio needs all its tokens."""
        assert old is not None
        lengths = torch.tensor([sample.length for sample in samples])
        return {"correction": self.of_samples(old.logprob, sampler_logprobs(samples), lengths)}

    def weights(self, tokens: Tokens) -> torch.Tensor:
        """Those of the column."""
        return tokens.column["correction"]

    def of_samples(
        self, logprob: torch.Tensor, sampler_logprob: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Weights [N], equal along each sample; lengths: tokens per sample, [R]."""
        sample_of_token = torch.repeat_interleave(lengths)
        difference = (logprob - sampler_logprob).double()
        total = difference.new_zeros(len(lengths)).index_add(0, sample_of_token, difference)
        # Beyond the bounds the weight is 0, so only what exp can hold needs to be computed.
        ratio = total.clamp(max=math.log(self.high) + 1).exp()
        return (ratio * within(ratio, self.low, self.high)).float()[sample_of_token]


class IcePop(_PerToken):
    """k_t within the bounds, 0 beyond."""

    default_low, default_high = 0.5, 5.0
    reads_low = True

    def bounded(self, ratio: torch.Tensor) -> torch.Tensor:
        """The ratio where it is within."""
        return ratio * within(ratio, self.low, self.high)


CORRECTIONS: dict[str, type[Correction]] = {
    "off": Correction,
    "token_truncate": TokenTruncate,
    "sequence_mask": SequenceMask,
    "icepop": IcePop,
}


def within(ratio: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """1 where low <= ratio <= high, else 0, in the dtype of `ratio`."""
    return ((ratio >= low) & (ratio <= high)).to(ratio.dtype)
