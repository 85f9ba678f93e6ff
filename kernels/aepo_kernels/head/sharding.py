"""A vocabulary that is split over ranks: each rank's row statistics become those of whole rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from aepo_kernels.problem import VocabShard
from aepo_kernels.rows.interface import RowStats


def local_targets(targets: Tensor, shard: VocabShard, num_rows: int) -> Tensor:
    """Targets [N] as rows of this rank's weight; -1 where the target is another rank's."""
    local = targets - shard.start
    return local.masked_fill((local < 0) | (local >= num_rows), -1)


def combine(
    stats: RowStats,
    targets: Tensor,
    inv_temperature: float | Tensor,
    second_inv_temperature: float | Tensor | None,
    shard: VocabShard,
) -> RowStats:
    """Statistics of the whole rows, [C] each, from two all-reduces, or three for `is_top1`.

    stats: of this rank's columns. A rank with normaliser l_r and entropy H_r has the mass w_r =
    exp(l_r - l), and the row's entropy is sum_r w_r (H_r - log w_r). All numbers are relative to
    the largest logit of all ranks: float32 would round the masses at the size of the logits
    themselves.
    """
    owned = targets >= 0
    top = stats.max_logit.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=shard.group)
    # A rank of -inf alone, as of rows that pad the vocabulary, has no mass and no numbers.
    nothing = stats.max_logit == -torch.inf  # [C]
    drop = stats.max_logit - top

    def relative(log_sum: Tensor, inverse: float | Tensor) -> Tensor:
        return torch.where(nothing, -torch.inf, drop * inverse + log_sum)

    def logit_of(logprob: Tensor, log_sum: Tensor) -> Tensor:
        return torch.where(nothing, -torch.inf, logprob + log_sum)

    below = [relative(stats.log_sum, inv_temperature)]
    logits = [logit_of(stats.logprob, below[0])]
    if second_inv_temperature is not None:
        assert stats.second_logprob is not None and stats.second_log_sum is not None
        below.append(relative(stats.second_log_sum, second_inv_temperature))
        logits.append(logit_of(stats.second_logprob, below[1]))
    mass = torch.stack(below).exp()
    moment = torch.where(nothing, 0.0, mass[0] * (stats.entropy - below[0]))
    parts = [mass, torch.where(owned, torch.stack(logits), 0.0), moment[None]]
    if stats.sum_squares is not None:
        squares = mass[0].square() * stats.sum_squares
        parts.append(torch.where(nothing, 0.0, squares)[None])
    if stats.logit_sum is not None and stats.is_top1 is not None:
        # Of the ranks with the largest logit, the one with the least token ids decides.
        is_at_top = stats.max_logit == top
        last_start = torch.where(is_at_top, -shard.start, -shard.vocab)  # [C]
        dist.all_reduce(last_start, dist.ReduceOp.MAX, group=shard.group)
        decides = is_at_top & (last_start == -shard.start)
        parts.append(torch.stack([stats.logit_sum, stats.is_top1 * decides]))
    sums = torch.cat(parts)
    dist.all_reduce(sums, group=shard.group)
    mass, logits, moment, *more = sums.split([len(part) for part in parts])
    log_sums = mass.log()
    logprobs = logits - log_sums
    entropy = moment[0] / mass[0] + log_sums[0]
    second = (None, None) if len(below) == 1 else (logprobs[1], log_sums[1])
    squares = None if stats.sum_squares is None else more[0][0] / mass[0].square()
    logit_stats = (None, None) if stats.logit_sum is None else more[-1]
    return RowStats(logprobs[0], entropy, top, log_sums[0], *second, squares, *logit_stats)
