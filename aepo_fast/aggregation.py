"""From per-token losses to one number: weights with global denominators."""

from __future__ import annotations

import torch


def token_weights(
    lengths: torch.Tensor,
    mode: str,
    *,
    max_length: int,
    num_rows_total: int,
    num_tokens_total: int,
) -> torch.Tensor:
    """Weight of every token of each row, [R], such that the loss is sum_r w_r sum_t l_rt.

    lengths: tokens per row, int [R]. The totals are those of the whole minibatch, over all
    micro-batches and ranks, so that parts add up to the same loss however it is split.
    token_mean: 1 / tokens (DAPO, arXiv 2503.14476). sequence_mean: 1 / (rows * length) (GRPO,
    2402.03300). constant_length: 1 / (rows * max_length) (Dr.GRPO, 2503.20783).
    """
    if mode == "token_mean":
        return torch.full_like(lengths, 1 / max(num_tokens_total, 1), dtype=torch.float32)
    if mode == "sequence_mean":
        return 1 / (max(num_rows_total, 1) * lengths.clamp(min=1).float())
    assert mode == "constant_length", mode
    weight = 1 / (max(num_rows_total, 1) * max_length)
    return torch.full_like(lengths, weight, dtype=torch.float32)
