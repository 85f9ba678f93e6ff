# The bodies of kernels are Triton, whose launches and operators are not Python's:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
"""Row operations on a chunk of logits as Triton kernels; the interface is that of `torch_rows`.

The kernels compute in float32. A row's statistics take one read of the row: the kernel keeps a
running maximum, and rescales all sums when the maximum rises. A row's gradient takes one read and
one write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aepo_kernels.gpu.launch import grad_launch, stats_launch
from aepo_kernels.rows.interface import LogitMap, RowCoefs, RowStats

LOG2E = tl.constexpr(1.4426950408889634)
# A logit that replaces -inf: its exp is 0 as well, and 0 times the logit is 0, not NaN.
FLOOR = tl.constexpr(-1e30)


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
) -> RowStats:
    """Log-prob, entropy and normalisers of each row, [C] each, in nats.

    raw_logits: [C, V], V contiguous. targets: [C] int64; a target outside [0, V) gives a log-prob
    of NaN. Inverse temperatures: a number or [C]. dtype: of the results, float32. squares: give the
    sum of squared probabilities, too. logit_stats: give `logit_sum` and `is_top1`, too.
    """
    assert dtype == torch.float32, dtype
    num_rows, vocab = raw_logits.shape
    wanted = second_inv_temperature is not None, squares, logit_stats
    out = new_stats(raw_logits, num_rows, *wanted)  # [S, C]
    if num_rows:
        launch = stats_launch(raw_logits.device)
        stats_kernel[(num_rows,)](
            _rows_of(raw_logits),
            raw_logits.stride(0),
            targets.contiguous(),
            optional_argument(inv_temperature),
            optional_argument(second_inv_temperature),
            logit_map.bias,
            logit_map.scale,
            logit_map.softcap,
            out,
            num_rows,
            vocab,
            PER_TOKEN=isinstance(inv_temperature, Tensor),
            SECOND_PER_TOKEN=isinstance(second_inv_temperature, Tensor),
            SQUARES=squares,
            LOGIT_STATS=logit_stats,
            BLOCK=launch.block,
            VECTOR=16 // raw_logits.element_size(),
            STAGES=launch.stages,
            num_warps=launch.num_warps,
        )
    return stats_of(out, *wanted)


def new_stats(
    like: Tensor, num_rows: int, has_second: bool, squares: bool, logit_stats: bool
) -> Tensor:
    """Memory [S, C] for S statistics of C rows, one statistic after another."""
    size = 4 + 2 * has_second + squares + 2 * logit_stats
    return like.new_empty((size, num_rows), dtype=torch.float32)


def stats_of(out: Tensor, has_second: bool, squares: bool, logit_stats: bool) -> RowStats:
    """The statistics that a kernel wrote to `out` [S, C], by name."""
    wanted = (True,) * 4 + (has_second,) * 2 + (squares,) + (logit_stats,) * 2
    found = iter(out)
    return RowStats(*(next(found) if want else None for want in wanted))  # type: ignore[arg-type]


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
) -> None:
    """Write the loss's gradient by raw logits into `out`; add its column sums to `bias_grad`.

    The formula is that of `torch_rows.row_grad`. raw_logits, out: [C, V], V contiguous; `out` may
    be `raw_logits` itself. stats, coefs: [C] each. bias_grad: [V] float32 or None.
    """
    num_rows, vocab = raw_logits.shape
    if not num_rows:
        return
    launch = grad_launch(raw_logits.device)
    # Each group of rows writes a row of partial column sums, [groups, V]. Adding those rows up
    # needs no atomics, and its order is fixed.
    rows_each = 1 if bias_grad is None else 64
    num_groups = triton.cdiv(num_rows, rows_each)
    partial = None if bias_grad is None else out.new_empty((num_groups, vocab), dtype=torch.float32)
    if coefs.second_logprob is None:
        second_inv_temperature = None
    grad_kernel[(num_groups * triton.cdiv(vocab, launch.block),)](
        _rows_of(raw_logits),
        raw_logits.stride(0),
        targets.contiguous(),
        optional_argument(inv_temperature),
        optional_argument(second_inv_temperature),
        logit_map.bias,
        logit_map.scale,
        logit_map.softcap,
        stats.max_logit.contiguous(),
        stats.log_sum.contiguous(),
        stats.entropy.contiguous(),
        None if second_inv_temperature is None else optional_argument(stats.second_log_sum),
        *(optional_argument(coef) for coef in coefs),
        _rows_of(out),
        out.stride(0),
        partial,
        num_rows,
        vocab,
        PER_TOKEN=isinstance(inv_temperature, Tensor),
        SECOND_PER_TOKEN=isinstance(second_inv_temperature, Tensor),
        ROWS=rows_each,
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
    if bias_grad is not None and partial is not None:
        bias_grad.add_(partial.sum(0))


def _rows_of(matrix: Tensor) -> Tensor:
    assert matrix.stride(1) == 1, "the vocabulary must be the contiguous dimension"
    return matrix


def optional_argument(value: float | Tensor | None) -> float | Tensor | None:
    """A kernel's argument: a number, a contiguous tensor, or None for an argument left out."""
    return value.contiguous() if isinstance(value, Tensor) else value


@triton.jit
def _tanh(x):
    # exp of a negative number cannot overflow.
    small = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    size = (1 - small) / (1 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def to_logits(values, bias, scale, softcap):
    """Raw logits to logits, and the softcap's derivative; bias and softcap may be None."""
    logits = values.to(tl.float32)
    if bias is not None:
        logits += bias
    logits *= scale
    slope = 1.0
    if softcap is not None:
        capped = _tanh(logits / softcap)
        slope = 1 - capped * capped
        logits = softcap * capped
    return logits, slope


@triton.jit
def inverse_of(inv_temperature, row, PER_TOKEN: tl.constexpr):
    """1/T of a row, from one number for all rows or from one per row, [C]."""
    if PER_TOKEN:
        return tl.load(inv_temperature + row)
    else:
        return inv_temperature


@triton.jit(do_not_specialize=["num_rows"])
def stats_kernel(
    raw_logits,
    row_stride,
    targets,
    inv_temperature,
    second_inv_temperature,
    bias,
    scale,
    softcap,
    out,
    num_rows,
    vocab,
    PER_TOKEN: tl.constexpr,
    SECOND_PER_TOKEN: tl.constexpr,
    SQUARES: tl.constexpr,
    LOGIT_STATS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    raw_logits += row * row_stride
    inverse = inverse_of(inv_temperature, row, PER_TOKEN)
    rate = inverse * LOG2E
    second_rate = 0.0
    if second_inv_temperature is not None:
        second_inverse = inverse_of(second_inv_temperature, row, SECOND_PER_TOKEN)
        second_rate = second_inverse * LOG2E

    # Each lane keeps an online softmax of its own over the VECTOR columns that it loads at once. So
    # no step of the loop waits for other threads. within: [LANES, VECTOR].
    LANES: tl.constexpr = BLOCK // VECTOR
    within = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    lane_maximum = tl.full([LANES], FLOOR, tl.float32)
    total = tl.zeros([LANES], tl.float32)  # of e = exp((logit - lane_maximum) / T)
    moment = tl.zeros([LANES], tl.float32)  # of e * (logit - lane_maximum)
    second_total = tl.zeros([LANES], tl.float32)
    square = tl.zeros([LANES], tl.float32)  # of e^2
    logit_sum = tl.zeros([LANES], tl.float32)
    before = tl.full([LANES], FLOOR, tl.float32)  # the largest logit before the target
    if LOGIT_STATS:
        place = tl.load(targets + row).to(tl.int32)
    for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        columns = start + within
        inside = columns < vocab
        values = tl.load(raw_logits + columns, mask=inside, other=0.0)
        shift = None
        if bias is not None:
            shift = tl.load(bias + columns, mask=inside, other=0.0)
        logits, _ = to_logits(values, shift, scale, softcap)
        if LOGIT_STATS:
            logit_sum += tl.sum(tl.where(inside, logits, 0.0), 1)
        logits = tl.where(inside & ~(logits < FLOOR), logits, FLOOR)  # NaN stays
        if LOGIT_STATS:
            before = tl.maximum(before, tl.max(tl.where(columns < place, logits, FLOOR), 1))
        new_maximum = tl.maximum(lane_maximum, tl.max(logits, 1))
        rise = lane_maximum - new_maximum
        centred = logits - new_maximum[:, None]
        decay = tl.exp2(rise * rate)
        weights = tl.exp2(centred * rate)
        moment = (moment + rise * total) * decay + tl.sum(weights * centred, 1)
        total = total * decay + tl.sum(weights, 1)
        if SQUARES:
            square = square * (decay * decay) + tl.sum(weights * weights, 1)
        if second_inv_temperature is not None:
            second_total *= tl.exp2(rise * second_rate)
            second_total += tl.sum(tl.exp2(centred * second_rate), 1)
        lane_maximum = new_maximum

    maximum = tl.max(lane_maximum, 0)
    rise = lane_maximum - maximum
    decay = tl.exp2(rise * rate)
    mass = tl.sum(total * decay, 0)
    log_sum = tl.log(
        tl.where(maximum > FLOOR, mass, float("nan"))
    )  # no finite logit: no distribution
    target = tl.load(targets + row)
    owned = (target >= 0) & (target < vocab)
    value = tl.load(raw_logits + target, mask=owned, other=float("nan"))
    shift = None
    if bias is not None:
        shift = tl.load(bias + target, mask=owned, other=0.0)
    logit, _ = to_logits(value, shift, scale, softcap)
    centred = logit - maximum
    out += row
    step = num_rows.to(tl.int64)
    tl.store(out, centred * inverse - log_sum)
    spread = tl.sum((moment + rise * total) * decay, 0)
    tl.store(out + step, log_sum - spread * inverse / mass)
    tl.store(out + 2 * step, maximum)
    tl.store(out + 3 * step, log_sum)
    if SQUARES:
        last = 4 if second_inv_temperature is None else 6
        tl.store(out + last * step, tl.sum(square * (decay * decay), 0) / (mass * mass))
    if LOGIT_STATS:
        last = (4 if second_inv_temperature is None else 6) + SQUARES
        is_top1 = owned & (logit >= maximum) & (logit > tl.max(before, 0))
        tl.store(out + last * step, tl.sum(logit_sum, 0))
        tl.store(out + (last + 1) * step, is_top1.to(tl.float32))
    if second_inv_temperature is not None:
        second_mass = tl.sum(second_total * tl.exp2(rise * second_rate), 0)
        second_log_sum = tl.log(tl.where(maximum > FLOOR, second_mass, float("nan")))
        tl.store(out + 4 * step, centred * second_inverse - second_log_sum)
        tl.store(out + 5 * step, second_log_sum)


@triton.jit(do_not_specialize=["num_rows"])
def grad_kernel(
    raw_logits,
    row_stride,
    targets,
    inv_temperature,
    second_inv_temperature,
    bias,
    scale,
    softcap,
    max_logits,
    log_sums,
    entropies,
    second_log_sums,
    by_logprob,
    by_entropy,
    by_lse,
    by_second,
    out,
    out_stride,
    partial,
    num_rows,
    vocab,
    PER_TOKEN: tl.constexpr,
    SECOND_PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_tiles = tl.cdiv(vocab, BLOCK)
    group = (tl.program_id(0) // num_tiles).to(tl.int64)
    columns = (tl.program_id(0) % num_tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    shift = None
    if bias is not None:
        shift = tl.load(bias + columns, mask=inside, other=0.0)
    column_sum = tl.zeros([BLOCK], tl.float32)
    for row in range(group * ROWS, tl.minimum(group * ROWS + ROWS, num_rows)):
        inverse = inverse_of(inv_temperature, row, PER_TOKEN)
        target = tl.load(targets + row)
        maximum = tl.load(max_logits + row)
        log_sum = tl.load(log_sums + row)
        values = tl.load(raw_logits + row * row_stride + columns, mask=inside, other=0.0)
        logits, slope = to_logits(values, shift, scale, softcap)
        centred = logits - maximum
        centred = tl.where(centred < FLOOR, FLOOR, centred)
        tempered = centred * inverse
        # p = exp(tempered) / exp(log_sum), which is most exact for the largest logits.
        distribution = tl.exp2(tempered * LOG2E) * tl.exp2(log_sum * -LOG2E)

        on_target = 0.0
        constant = 0.0
        if by_logprob is not None:
            on_target = tl.load(by_logprob + row)
            constant -= on_target
        if by_lse is not None:
            constant += tl.load(by_lse + row)
        factor = inverse * scale
        if by_entropy is not None:
            by = tl.load(by_entropy + row)
            constant += by * (log_sum - tl.load(entropies + row))
            grad = distribution * (constant - by * tempered) * factor
        else:
            grad = distribution * (constant * factor)
        on_target *= factor
        if second_inv_temperature is not None:
            second_inverse = inverse_of(second_inv_temperature, row, SECOND_PER_TOKEN)
            by = tl.load(by_second + row) * second_inverse * scale
            second_mass = tl.exp2(tl.load(second_log_sums + row) * -LOG2E)
            grad -= (by * second_mass) * tl.exp2(centred * (second_inverse * LOG2E))
            on_target += by
        grad = tl.where(columns == target, grad + on_target, grad) * slope
        tl.store(out + row * out_stride + columns, grad.to(out.dtype.element_ty), mask=inside)
        column_sum += grad
    if partial is not None:
        tl.store(partial + group * vocab + columns, column_sum, mask=inside)
