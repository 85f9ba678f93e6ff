"""Importance correction: weights for samples whose law is not quite the trainer's.

The sampler rounds otherwise than the trainer and may hold older weights. With
k = pi_trainer / pi_sampler, both at temperature 1, the policy loss of main rows is weighted by

- token_truncate: min(k_t, high), the truncated importance sampling of Yao et al., "Your Efficient
  RL Framework Secretly Brings You Off-Policy RL Training" (2025);
- icepop: k_t where low <= k_t <= high, else 0 (arXiv 2510.18855);
- sequence_mask: K where low <= K <= high, else 0, with K the product of k_t over the completion.

Auxiliary rows are never weighted: it would restore the law at temperature 1, whose difference from
the sampled one is their whole point.
"""

from __future__ import annotations

import math

import torch

from aepo_fast.config.method import LossConfig
from aepo_fast.method.policy_losses import probability_ratio


def token_correction(
    loss: LossConfig, logprob: torch.Tensor, sampler_logprob: torch.Tensor
) -> torch.Tensor:
    """Weights [N] of tokens under token_truncate or icepop, without a gradient."""
    low, high = bounds(loss)
    ratio = probability_ratio(logprob.detach(), sampler_logprob)
    if loss.correction == "token_truncate":
        return ratio.clamp(max=high)
    return ratio * within(ratio, low, high)


def sequence_correction(
    loss: LossConfig, logprob: torch.Tensor, sampler_logprob: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Weights [N] under sequence_mask, equal along each row; lengths: tokens per row, [R]."""
    low, high = bounds(loss)
    row = torch.repeat_interleave(lengths)
    difference = (logprob - sampler_logprob).double()
    total = difference.new_zeros(len(lengths)).index_add(0, row, difference)
    # Beyond the bounds the weight is 0, so only what exp can hold needs to be computed.
    ratio = total.clamp(max=math.log(high) + 1).exp()
    return (ratio * within(ratio, low, high)).float()[row]


def within(ratio: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """1 where low <= ratio <= high, else 0, in the dtype of `ratio`."""
    return ((ratio >= low) & (ratio <= high)).to(ratio.dtype)


def bounds(loss: LossConfig) -> tuple[float, float]:
    """correction_low and correction_high."""
    assert loss.correction_low is not None and loss.correction_high is not None
    return loss.correction_low, loss.correction_high
