"""Advantages relative to the other samples of the same prompt."""

from __future__ import annotations

import torch


def group_advantages(rewards: torch.Tensor, groups: torch.Tensor, mode: str) -> torch.Tensor:
    """Advantage of each row, fp32 [R]; 0 where a row has no reward or no one to compare with.

    rewards: [R], NaN where a row takes no part (auxiliary, or its scoring failed). groups: int
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
