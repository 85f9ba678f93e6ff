"""The reference backend: plain torch autograd on materialised float32 or float64 logits.

`head.kept_ids` runs the same code on the logits of few tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from aepo_kernels.loss_checks import check_closure, check_loss
from aepo_kernels.problem import LogprobOutput, Problem, TokenLoss, TokenLossOutput, sum_losses
from aepo_kernels.ranges import take


class Rows(NamedTuple):
    """Results of rows of logits, [M] each, in nats."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    second_logprob: Tensor | None
    sum_squares: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None


RowsOf = Callable[[Problem, Tensor | None], Rows]


def logprob(problem: Problem, rows_of: RowsOf | None = None) -> LogprobOutput:
    """`linear_logprob` on materialised logits, [N, V], or on what `rows_of` makes differentiable.

    rows_of: from the problem and the positions of its tokens, [M] or None for all, to their rows.
    """
    with torch.autocast(problem.hidden.device.type, enabled=False):
        kept = problem.kept()
        rows = (rows_of or _rows)(problem, kept)
        spread = [None if row is None else problem.spread(row, kept) for row in rows]
    names = problem.backend, problem.row_kernels
    return LogprobOutput(*spread[:5], *names, *spread[5:])  # type: ignore[arg-type]


def token_loss(
    problem: Problem,
    loss_fn: TokenLoss,
    token_tensors: tuple[Tensor, ...],
    rows_of: RowsOf | None = None,
) -> TokenLossOutput:
    """`linear_token_loss` of all tokens at once; rows_of: see `logprob`."""
    with torch.autocast(problem.hidden.device.type, enabled=False):
        kept = problem.kept()
        rows = (rows_of or _rows)(problem, kept)
        loss = torch.zeros((), dtype=problem.stats_dtype, device=problem.hidden.device)
        metrics: dict[str, Tensor] = {}
        if len(rows.logprob):
            slices = [take(tensor, kept) for tensor in token_tensors]
            values = _frozen_outside(problem, kept, rows)
            vectors = values.logprob, values.entropy, values.second_logprob
            if problem.check_loss:
                check_loss(loss_fn, vectors, slices)
            chunk_loss, metrics = sum_losses(loss_fn(*vectors, *slices))
            check_closure(chunk_loss, vectors)
            loss = loss + chunk_loss
        if not loss.requires_grad:
            # A sum over no rows is 0, and it connects the loss to every input. Where rows do, it
            # would cost a gradient of zeros of each: [V, H] of the weight.
            inputs = [x for x in problem.inputs if x is not None]
            loss = loss + torch.stack([x[:0].sum().to(loss.dtype) for x in inputs]).sum()
        detached = [
            None if row is None else problem.spread(row.detach(), kept)
            for row in (rows.logprob, rows.entropy, rows.second_logprob)
        ]
    first, entropy, second = detached
    assert first is not None and entropy is not None
    active = 0
    if loss.requires_grad:
        active = len(rows.logprob if problem.active is None else problem.active)
    metrics = {name: value.detach() for name, value in metrics.items()}
    names = problem.backend, problem.row_kernels
    return TokenLossOutput(loss, metrics, first, entropy, second, *names, active)


def _rows(problem: Problem, kept: Tensor | None) -> Rows:
    dtype = problem.stats_dtype
    inputs = take(problem.hidden, kept).to(dtype)  # [M, H]
    logits = inputs @ problem.weight.to(dtype).T  # [M, V]
    if problem.lora_a is not None and problem.lora_b is not None:
        low_rank = inputs @ problem.lora_a.to(dtype).T @ problem.lora_b.to(dtype).T
        logits = logits + problem.lora_scale * low_rank
    if problem.bias is not None:
        logits = logits + problem.bias.to(dtype)
    outside = None
    if problem.kept_ids is not None:
        ids = take(problem.kept_ids, kept)  # [M, K], -1 goes to a column of its own
        outside = torch.ones(len(ids), logits.shape[1] + 1, dtype=torch.bool, device=ids.device)
        outside = outside.scatter_(1, ids.where(ids >= 0, logits.shape[1]), False)[:, :-1]
    targets = take(problem.targets, kept)
    return rows_of_logits(problem, kept, logits, targets, outside)


def rows_of_logits(
    problem: Problem,
    kept: Tensor | slice | None,
    raw_logits: Tensor,
    targets: Tensor,
    outside: Tensor | None,
) -> Rows:
    """The results of raw logits [M, V] of the tokens at the positions `kept`, in plain torch.

    targets: columns [M]. outside: [M, V], the logits that do not count, or None.
    """
    dtype, targets = problem.stats_dtype, targets[:, None]  # [M, 1]
    logits = raw_logits * problem.logit_scale
    if problem.softcap is not None:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    if outside is not None:
        logits = logits.masked_fill(outside, -torch.inf)
    tempered = logits / _column(problem.temperature, kept, dtype)
    logp = torch.log_softmax(tempered, dim=1)  # [M, V]
    # Where p is 0, p log p is 0, but 0 * -inf would be NaN.
    finite = logp.masked_fill(logp == -torch.inf, 0.0)
    second = None
    if problem.second_temperature is not None:
        other = logits / _column(problem.second_temperature, kept, dtype)
        second = torch.log_softmax(other, dim=1).gather(1, targets).squeeze(1)
    return Rows(
        logprob=logp.gather(1, targets).squeeze(1),
        entropy=-(finite.exp() * finite).sum(1),
        lse=torch.logsumexp(tempered, dim=1),
        second_logprob=second,
        sum_squares=logp.detach().exp().square().sum(1) if problem.sum_squares else None,
        mean_logits=tempered.detach().mean(1) if problem.mean_logits else None,
        is_top1=_is_top1(logits.detach(), targets) if problem.is_top1 else None,
    )


def _is_top1(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether the target, [M, 1], is the first of a row's largest logits, as argmax is: [M]."""
    largest = logits.amax(1)
    return (logits.argmax(1) == targets[:, 0]) & (largest > -torch.inf)  # false beside NaN


def _frozen_outside(problem: Problem, kept: Tensor | None, rows: Rows) -> Rows:
    """The rows, without a gradient at tokens that are not active."""
    if problem.active is None:
        return rows
    inside = torch.zeros_like(problem.targets, dtype=torch.bool)
    inside[problem.active] = True
    inside = take(inside, kept)
    return Rows(*(None if row is None else row.where(inside, row.detach()) for row in rows))  # type: ignore[arg-type]


def _column(
    temperature: float | Tensor, kept: Tensor | slice | None, dtype: torch.dtype
) -> float | Tensor:
    if isinstance(temperature, Tensor):
        return take(temperature, kept).to(dtype)[:, None]
    return temperature
