"""Row operations on a chunk of logits, in torch; see `aepo_kernels.rows.interface`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from aepo_kernels.rows.interface import LogitMap, RowCoefs, RowStats

# A log-weight that replaces -inf: its exp is 0 as well, and 0 times it is 0, not NaN.
_FLOOR = -1e30


def row_stats(
    raw_logits: Tensor,
    targets: Tensor,
    inv_temperature: float | Tensor,
    second_inv_temperature: float | Tensor | None,
    logit_map: LogitMap,
    dtype: torch.dtype,
    *,
    squares: bool = False,
    logit_stats: bool = False,
    block_elements: int | None = None,
) -> RowStats:
    """Log-prob, entropy and normalisers of each row, [C] each in `dtype`, in nats.

    raw_logits: [C, V], not changed. targets: [C] int64. Inverse temperatures: a number or [C].
    squares: give the sum of squared probabilities, too. logit_stats: give `logit_sum` and
    `is_top1`, too. block_elements: most elements of a scratch buffer; None takes all rows at once.
    """
    columns: list[list[Tensor | None]] = []
    for rows, logits, work in _blocks(raw_logits, dtype, 2, block_elements):
        _to_logits(raw_logits[rows], logit_map, logits)
        max_logit = logits.amax(1, keepdim=True)  # [B, 1]
        logit_sum = logits.sum(1) if logit_stats else None
        # argmax is the first of the largest.
        is_top1 = (logits.argmax(1) == targets[rows]).to(dtype) if logit_stats else None
        centred = logits.sub_(max_logit)
        target = _at_targets(centred, targets[rows])  # [B, 1], before the floor: may be -inf
        centred.clamp_(min=_FLOOR)
        second: list[Tensor | None] = [None, None]
        if second_inv_temperature is not None:
            inverse = _column(second_inv_temperature, rows)
            log_sum = torch.mul(centred, inverse, out=work).exp_().sum(1).log_()
            second = [(target * inverse).squeeze(1) - log_sum, log_sum]
        inverse = _column(inv_temperature, rows)
        tempered = _scale_(centred, inverse)
        weights = torch.exp(tempered, out=work)
        total = weights.sum(1)  # [B]
        log_sum = total.log()
        sum_squares = weights.square().sum(1).div_(total.square()) if squares else None
        # H = log_sum - E[tempered]
        entropy = log_sum - weights.mul_(tempered).sum(1).div_(total)
        logprob = (target * inverse).squeeze(1) - log_sum
        more = sum_squares, logit_sum, is_top1
        columns.append([logprob, entropy, max_logit.squeeze(1), log_sum, *second, *more])
    joined = [
        None if parts[0] is None else torch.cat(parts)  # type: ignore[arg-type]
        for parts in zip(*columns, strict=True)
    ]
    return RowStats(*joined)  # type: ignore[arg-type]


def row_grad(
    raw_logits: Tensor,
    targets: Tensor,
    inv_temperature: float | Tensor,
    second_inv_temperature: float | Tensor | None,
    logit_map: LogitMap,
    stats: RowStats,
    coefs: RowCoefs,
    *,
    out: Tensor,
    bias_grad: Tensor | None,
    block_elements: int | None = None,
) -> None:
    """Write the loss's gradient by raw logits into `out`; add its column sums to `bias_grad`.

    With p = softmax(z / T), lp_j = log p_j, entropy H and coefficients c of each row, by logits z:
    dz_j = ((c_lp (1{j=y} - p_j) + c_lse p_j - c_H p_j (lp_j + H)) / T + c_2 (1{j=y} - q_j) / T2,
    q being the distribution of the second temperature. out: [C, V], may be `raw_logits` itself.
    """
    dtype = stats.log_sum.dtype
    count = 3 if coefs.entropy is not None or coefs.second_logprob is not None else 2
    for rows, logits, *work in _blocks(raw_logits, dtype, count, block_elements):
        _to_logits(raw_logits[rows], logit_map, logits)
        slope = None
        if logit_map.softcap is not None:
            slope = logits.div(logit_map.softcap).square_().neg_().add_(1)
        block, coef = stats.select(rows), coefs.select(rows)
        centred = logits.sub_(block.max_logit[:, None]).clamp_(min=_FLOOR)
        second = None
        if coef.second_logprob is not None:
            assert second_inv_temperature is not None and block.second_log_sum is not None
            inverse = _column(second_inv_temperature, rows)
            by_target = coef.second_logprob[:, None] * inverse * logit_map.scale
            second = torch.mul(centred, inverse, out=work[1]).exp_()
            second.mul_(-by_target * block.second_log_sum.neg().exp()[:, None])
            _add_at_targets(second, targets[rows], by_target)
        inverse = _column(inv_temperature, rows)
        grad = _first_grad(
            _scale_(centred, inverse), work[0], targets[rows], block, coef, inverse, logit_map.scale
        )
        if second is not None:
            grad.add_(second)
        if slope is not None:
            grad.mul_(slope)
        if bias_grad is not None:
            bias_grad.add_(grad.sum(0))
        out[rows].copy_(grad)


def _first_grad(
    tempered: Tensor,
    work: Tensor,
    targets: Tensor,
    stats: RowStats,
    coef: RowCoefs,
    inverse: float | Tensor,
    scale: float,
) -> Tensor:
    # dz = exp(tempered) * (constant + slope * tempered). tempered, work: [B, V]. A row's factors,
    # [B], are multiplied before they meet the matrix.
    zero = torch.zeros_like(stats.log_sum)
    by_target = zero if coef.logprob is None else coef.logprob
    constant = -by_target if coef.lse is None else coef.lse - by_target
    factor = stats.log_sum.neg().exp()[:, None] * inverse * scale
    weights = torch.exp(tempered, out=work)
    if coef.entropy is None:
        grad = weights.mul_(constant[:, None] * factor)
    else:
        constant = constant + coef.entropy * (stats.log_sum - stats.entropy)
        tempered.mul_(-coef.entropy[:, None] * factor).add_(constant[:, None] * factor)
        grad = weights.mul_(tempered)
    target_grad = by_target[:, None] * inverse * scale
    return _add_at_targets(grad, targets, target_grad.to(grad.dtype))


# A target of -1 belongs to another rank: the row has no logit of its target, and no gradient by it.


def _at_targets(logits: Tensor, targets: Tensor) -> Tensor:
    column, last = targets[:, None], logits.shape[1] - 1
    # On a GPU no check has looked at the targets.
    bad = (column < -1) | (column > last)
    return logits.gather(1, column.clamp(0, last)).masked_fill(bad, torch.nan)


def _add_at_targets(grad: Tensor, targets: Tensor, values: Tensor) -> Tensor:
    column, last = targets[:, None], grad.shape[1] - 1
    outside = (column < 0) | (column > last)
    return grad.scatter_add_(1, column.clamp(0, last), values.masked_fill(outside, 0.0))


def _blocks(
    raw_logits: Tensor, dtype: torch.dtype, num_buffers: int, block_elements: int | None
) -> Iterator[tuple[slice, *tuple[Tensor, ...]]]:
    """Slices of rows, each with scratch buffers [rows, V] in `dtype`; buffers are reused."""
    num_rows, vocab = raw_logits.shape
    size = max(1, num_rows if block_elements is None else block_elements // vocab)
    shape = (min(size, num_rows), vocab)
    buffers = [
        torch.empty(shape, dtype=dtype, device=raw_logits.device) for _ in range(num_buffers)
    ]
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        yield rows, *(buffer[: rows.stop - start] for buffer in buffers)


def _to_logits(raw_logits: Tensor, logit_map: LogitMap, out: Tensor) -> Tensor:
    out.copy_(raw_logits)
    if logit_map.bias is not None:
        out.add_(logit_map.bias)
    if logit_map.softcap is not None:
        return out.mul_(logit_map.scale / logit_map.softcap).tanh_().mul_(logit_map.softcap)
    return _scale_(out, logit_map.scale)


def _scale_(values: Tensor, factor: float | Tensor) -> Tensor:
    # A factor of 1.0, the common case, needs no pass over the values.
    return values if isinstance(factor, float) and factor == 1.0 else values.mul_(factor)


def _column(inverse: float | Tensor, rows: slice) -> float | Tensor:
    return inverse[rows, None] if isinstance(inverse, Tensor) else inverse
