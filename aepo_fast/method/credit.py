"""From rewards to each token's weight: advantages, aggregation and minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

Advantage = Literal["group_norm", "group_mean"]
Aggregation = Literal["token_mean", "sequence_mean", "constant_length"]


def group_advantages(rewards: torch.Tensor, groups: torch.Tensor, mode: Advantage) -> torch.Tensor:
    """Advantage of each sample, fp32 [R]; 0 without a reward or others to compare with.

    rewards: [R], NaN where a sample takes no part (auxiliary, or its scoring failed). groups: int
    [R]. group_norm: (R - mean) / (std + 1e-6) with the unbiased std (GRPO, arXiv 2402.03300).
    group_mean: R - mean (Dr.GRPO, 2503.20783).
    """
    advantages = torch.zeros(len(rewards), device=rewards.device)
    for group in groups.unique():
        members = (groups == group) & ~rewards.isnan()
        if members.sum() < 2:
            continue
        values = rewards[members].double()
        centred = values - values.mean()
        # Equal rewards centre to rounding noise, which the division would blow up.
        if bool((values == values[0]).all()):
            continue
        if mode == "group_norm":
            centred = centred / (values.std() + 1e-6)
        advantages[members] = centred.float()
    return advantages


def token_weights(
    lengths: torch.Tensor,
    mode: Aggregation,
    *,
    max_length: int,
    num_samples_total: int,
    num_tokens_total: int,
) -> torch.Tensor:
    """Weight of every token of each sample, [R], such that the loss is sum_r w_r sum_t l_rt.

    lengths: tokens per sample, int [R]. The totals are those of the whole minibatch, over all
    micro-batches and ranks, so that parts add up to the same loss however it is split.
    token_mean: 1 / tokens (DAPO, arXiv 2503.14476). sequence_mean: 1 / (samples * length) (GRPO,
    2402.03300). constant_length: 1 / (samples * max_length) (Dr.GRPO, 2503.20783).
    """
    if mode == "token_mean":
        return torch.full_like(lengths, 1 / max(num_tokens_total, 1), dtype=torch.float32)
    if mode == "sequence_mean":
        return 1 / (max(num_samples_total, 1) * lengths.clamp(min=1).float())
    weight = 1 / (max(num_samples_total, 1) * max_length)
    return torch.full_like(lengths, weight, dtype=torch.float32)


def plan_minibatches(
    main_groups: Sequence[Sequence[int]],
    positives: Sequence[int],
    *,
    num_minibatches: int,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Sample indices of each minibatch.

    main_groups: samples of each prompt; groups are shuffled and kept whole, their numbers differ
    by at most one over the minibatches. positives: auxiliary samples with a gradient, spread the
    same way, so that AEPO's share is the same in every minibatch.
    """
    minibatches: list[list[int]] = [[] for _ in range(num_minibatches)]
    for position, group in enumerate(rng.permutation(len(main_groups))):
        minibatches[position % num_minibatches].extend(main_groups[group])
    # From the other end, so that no minibatch gets both the odd group and the odd positive.
    for position, index in enumerate(rng.permutation(np.array(positives, dtype=np.int64))):
        minibatches[-1 - position % num_minibatches].append(int(index))
    return minibatches
