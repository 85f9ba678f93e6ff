# The bodies of kernels are Triton, whose launches and operators are not Python's:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
"""Row statistics straight from hidden states, as Triton kernels: the logits never reach memory.

A first kernel multiplies a tile of tokens by a tile of the vocabulary. It writes, for each row of
the tile's logits, the numbers that an online softmax carries: the maximum, and sums relative to
that maximum. A second kernel combines the tiles of a row, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from aepo_kernels.gpu.launch import fused_launch
from aepo_kernels.gpu.rows import (
    FLOOR,
    LOG2E,
    new_stats,
    optional_argument,
    stats_of,
    to_logits,
)
from aepo_kernels.rows.interface import LogitMap, RowStats

# Tokens of a program that combines tiles, and tiles that it reads at once. Not measured.
_COMBINE_ROWS, _COMBINE_TILES = 32, 32


def linear_row_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inv_temperature: float | Tensor,
    second_inv_temperature: float | Tensor | None,
    logit_map: LogitMap,
    *,
    squares: bool = False,
    logit_stats: bool = False,
) -> RowStats:
    """The row statistics, [C] float32, that `torch_rows.row_stats` gives for hidden @ weight.T.

    hidden: [C, H]. weight: [V, H] in hidden's dtype, never float64, with any strides. targets: [C]
    int64; a target outside [0, V) gives a log-prob of NaN. Inverse temperatures: a number or [C].
    squares: give the sum of squared probabilities, too. logit_stats: give `logit_sum` and
    `is_top1`, too. The kernels need 12 to 28 bytes of memory per token and tile of the vocabulary.
    """
    num_rows, hidden_size = hidden.shape
    vocab = weight.shape[0]
    wanted = second_inv_temperature is not None, squares, logit_stats
    out = new_stats(hidden, num_rows, *wanted)
    if num_rows:
        fits_tma = all(_fits_tma(matrix) for matrix in (hidden, weight))
        launch = fused_launch(hidden.device, hidden.dtype, fits_tma, logit_stats)
        num_tiles = triton.cdiv(vocab, launch.block_vocab)
        num_parts = triton.cdiv(vocab, launch.block_vocab // (1 + launch.split))
        size = 3 + wanted[0] + squares + 2 * logit_stats
        partials = out.new_empty((size, num_parts, num_rows))  # [S, parts, C]
        target_logits = out.new_full((num_rows,), float("nan"))  # [C]
        temperatures = [
            optional_argument(inv_temperature),
            optional_argument(second_inv_temperature),
        ]
        flags = {
            "PER_TOKEN": isinstance(inv_temperature, Tensor),
            "SECOND_PER_TOKEN": isinstance(second_inv_temperature, Tensor),
            "SQUARES": squares,
            "LOGIT_STATS": logit_stats,
        }
        partials_kernel[(num_tiles * triton.cdiv(num_rows, launch.block_tokens),)](
            _operand(hidden, launch.block_tokens, launch.block_hidden, launch.tma),
            *hidden.stride(),
            _operand(weight, launch.block_vocab, launch.block_hidden, launch.tma),
            *weight.stride(),
            targets.contiguous(),
            *temperatures,
            logit_map.bias,
            logit_map.scale,
            logit_map.softcap,
            partials,
            target_logits,
            num_rows,
            vocab,
            hidden_size,
            **flags,
            TMA=launch.tma,
            BLOCK_TOKENS=launch.block_tokens,
            BLOCK_VOCAB=launch.block_vocab,
            BLOCK_HIDDEN=launch.block_hidden,
            GROUP=launch.group,
            SPLIT=launch.split,
            num_warps=launch.num_warps,
            num_stages=launch.stages,
        )
        combine_kernel[(triton.cdiv(num_rows, _COMBINE_ROWS),)](
            partials,
            target_logits,
            *temperatures,
            out,
            num_rows,
            num_parts,
            **flags,
            ROWS=_COMBINE_ROWS,
            TILES=_COMBINE_TILES,
            num_warps=4,
        )
    return stats_of(out, *wanted)


def _fits_tma(matrix: Tensor) -> bool:
    """Whether the copy engine (TMA) can read a matrix: rows of whole 16-byte units, aligned."""
    width = matrix.element_size()
    return (
        matrix.stride(1) == 1 and matrix.stride(0) * width % 16 == 0 and matrix.data_ptr() % 16 == 0
    )


def _operand(matrix: Tensor, rows: int, columns: int, tma: bool) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, columns]) if tma else matrix


@triton.jit(do_not_specialize=["num_rows"])
def partials_kernel(
    hidden,
    token_stride,
    hidden_stride,
    weight,
    vocab_stride,
    weight_stride,
    targets,
    inv_temperature,
    second_inv_temperature,
    bias,
    scale,
    softcap,
    partials,
    target_logits,
    num_rows,
    vocab,
    hidden_size,
    PER_TOKEN: tl.constexpr,
    SECOND_PER_TOKEN: tl.constexpr,
    SQUARES: tl.constexpr,
    LOGIT_STATS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # Programs that run at the same time share tiles of both operands in the cache. A group is GROUP
    # tiles of tokens by all tiles of the vocabulary, and its tiles of tokens change fastest.
    num_blocks = tl.cdiv(num_rows, BLOCK_TOKENS)
    num_tiles = tl.cdiv(vocab, BLOCK_VOCAB)
    per_group = GROUP * num_tiles
    first_block = (tl.program_id(0) // per_group) * GROUP
    group_size = tl.minimum(num_blocks - first_block, GROUP)
    block = first_block + (tl.program_id(0) % per_group) % group_size
    tile = (tl.program_id(0) % per_group) // group_size

    raw_logits = tl.zeros([BLOCK_TOKENS, BLOCK_VOCAB], tl.float32)
    if TMA:
        for start in range(0, hidden_size, BLOCK_HIDDEN):
            left = hidden.load([block * BLOCK_TOKENS, start])
            right = weight.load([tile * BLOCK_VOCAB, start])
            raw_logits = tl.dot(left, right.T, raw_logits, input_precision="ieee")
    else:
        # Rows and columns past the end read the last row again, so that no mask is needed.
        within = tl.arange(0, BLOCK_HIDDEN)
        rows = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        columns = tile * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
        row_starts = tl.minimum(rows, num_rows - 1).to(tl.int64) * token_stride
        column_starts = tl.minimum(columns, vocab - 1).to(tl.int64) * vocab_stride
        hidden_pointers = hidden + row_starts[:, None] + within[None, :] * hidden_stride
        weight_pointers = weight + column_starts[None, :] + within[:, None] * weight_stride
        for start in range(0, hidden_size, BLOCK_HIDDEN):
            inside = within < hidden_size - start
            left = tl.load(hidden_pointers, mask=inside[None, :], other=0.0)
            right = tl.load(weight_pointers, mask=inside[:, None], other=0.0)
            raw_logits = tl.dot(left, right, raw_logits, input_precision="ieee")
            hidden_pointers += BLOCK_HIDDEN * hidden_stride
            weight_pointers += BLOCK_HIDDEN * weight_stride

    rows = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row_inputs = targets, inv_temperature, second_inv_temperature
    logit_map = bias, scale, softcap
    # SPLIT: the two halves of a tile one after the other, because the sums of both halves together
    # would not fit the registers.
    PARTS: tl.constexpr = SPLIT + 1
    WIDTH: tl.constexpr = BLOCK_VOCAB // PARTS
    if SPLIT:
        parts = raw_logits.reshape(BLOCK_TOKENS, 2, WIDTH).permute(0, 2, 1).split()
    else:
        parts = (raw_logits,)
    for part in tl.static_range(PARTS):
        _store_partials(
            parts[part],
            PARTS * tile + part,
            rows,
            row_inputs,
            logit_map,
            partials,
            target_logits,
            num_rows,
            vocab,
            PER_TOKEN,
            SECOND_PER_TOKEN,
            SQUARES,
            LOGIT_STATS,
            WIDTH,
        )


@triton.jit
def _store_partials(
    raw_logits,
    part,
    rows,
    row_inputs,
    logit_map,
    partials,
    target_logits,
    num_rows,
    vocab,
    PER_TOKEN: tl.constexpr,
    SECOND_PER_TOKEN: tl.constexpr,
    SQUARES: tl.constexpr,
    LOGIT_STATS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the maximum and the sums of the columns from part * WIDTH on.

    raw_logits: [BLOCK_TOKENS, WIDTH]. rows: [BLOCK_TOKENS]. Each number goes to partials [S, parts,
    C], the target's logit to target_logits [C].
    """
    targets, inv_temperature, second_inv_temperature = row_inputs
    bias, scale, softcap = logit_map
    first = part * WIDTH
    columns = first + tl.arange(0, WIDTH)
    shift = None
    if bias is not None:
        shift = tl.load(bias + columns, mask=columns < vocab, other=0.0)[None, :]
    logits, _ = to_logits(raw_logits, shift, scale, softcap)
    real = rows < tl.where(first < vocab, num_rows, 0)  # the last half may start past the end
    target = tl.load(targets + rows, mask=real, other=-1)
    place = target - first
    on_target = tl.arange(0, WIDTH)[None, :] == place.to(tl.int32)[:, None]
    owned = (place >= 0) & (place < tl.minimum(WIDTH, vocab - first))
    tl.store(target_logits + rows, tl.sum(tl.where(on_target, logits, 0.0), 1), mask=owned & real)

    if LOGIT_STATS:
        logit_sum = tl.sum(tl.where((columns < vocab)[None, :], logits, 0.0), 1)
    logits = tl.where((columns < vocab)[None, :] & ~(logits < FLOOR), logits, FLOOR)
    maximum = tl.max(logits, 1)
    if LOGIT_STATS:
        is_before = tl.arange(0, WIDTH)[None, :] < place.to(tl.int32)[:, None]
        before = tl.max(tl.where(is_before, logits, FLOOR), 1)
    centred = logits - maximum[:, None]
    rate = _rates(inv_temperature, rows, real, PER_TOKEN)
    weights = tl.exp2(centred * rate)
    step = num_rows.to(tl.int64)
    partials += part * step + rows
    step *= tl.cdiv(vocab, WIDTH)
    tl.store(partials, maximum, mask=real)
    tl.store(partials + step, tl.sum(weights, 1), mask=real)
    tl.store(partials + 2 * step, tl.sum(weights * centred, 1), mask=real)
    last = 3 if second_inv_temperature is None else 4
    if SQUARES:
        tl.store(partials + last * step, tl.sum(weights * weights, 1), mask=real)
    if LOGIT_STATS:
        tl.store(partials + (last + SQUARES) * step, logit_sum, mask=real)
        tl.store(partials + (last + SQUARES + 1) * step, before, mask=real)
    if second_inv_temperature is not None:
        second_rate = _rates(second_inv_temperature, rows, real, SECOND_PER_TOKEN)
        tl.store(partials + 3 * step, tl.sum(tl.exp2(centred * second_rate), 1), mask=real)


@triton.jit
def _rates(inv_temperature, rows, real, PER_TOKEN: tl.constexpr):
    if PER_TOKEN:
        return (tl.load(inv_temperature + rows, mask=real, other=1.0) * LOG2E)[:, None]
    else:
        return inv_temperature * LOG2E


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def combine_kernel(
    partials,
    target_logits,
    inv_temperature,
    second_inv_temperature,
    out,
    num_rows,
    num_tiles,
    PER_TOKEN: tl.constexpr,
    SECOND_PER_TOKEN: tl.constexpr,
    SQUARES: tl.constexpr,
    LOGIT_STATS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = rows < num_rows
    width = num_rows.to(tl.int64)
    step = width * num_tiles
    maximum = tl.full([ROWS], FLOOR, tl.float32)
    for start in range(0, num_tiles, TILES):
        tiles = start + tl.arange(0, TILES)
        inside = (tiles < num_tiles)[:, None] & real[None, :]
        at = partials + tiles[:, None] * width + rows[None, :]
        maximum = tl.maximum(maximum, tl.max(tl.load(at, mask=inside, other=FLOOR), 0))

    inverse = _inverses(inv_temperature, rows, real, PER_TOKEN)
    rate = inverse * LOG2E
    second_rate = 0.0
    if second_inv_temperature is not None:
        second_inverse = _inverses(second_inv_temperature, rows, real, SECOND_PER_TOKEN)
        second_rate = second_inverse * LOG2E
    total = tl.zeros([ROWS], tl.float32)
    moment = tl.zeros([ROWS], tl.float32)
    second_total = tl.zeros([ROWS], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    logit_sum = tl.zeros([ROWS], tl.float32)
    before = tl.full([ROWS], FLOOR, tl.float32)
    last = 3 if second_inv_temperature is None else 4
    for start in range(0, num_tiles, TILES):
        tiles = start + tl.arange(0, TILES)
        inside = (tiles < num_tiles)[:, None] & real[None, :]
        at = partials + tiles[:, None] * width + rows[None, :]
        rise = tl.load(at, mask=inside, other=FLOOR) - maximum[None, :]
        part = tl.load(at + step, mask=inside, other=0.0)
        part_moment = tl.load(at + 2 * step, mask=inside, other=0.0)
        decay = tl.exp2(rise * rate)
        total += tl.sum(part * decay, 0)
        moment += tl.sum((part_moment + rise * part) * decay, 0)
        if second_inv_temperature is not None:
            second = tl.load(at + 3 * step, mask=inside, other=0.0)
            second_total += tl.sum(second * tl.exp2(rise * second_rate), 0)
        if SQUARES:
            part = tl.load(at + last * step, mask=inside, other=0.0)
            square += tl.sum(part * (decay * decay), 0)
        if LOGIT_STATS:
            at += (last + SQUARES) * step
            logit_sum += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
            part = tl.load(at + step, mask=inside, other=FLOOR)
            before = tl.maximum(before, tl.max(part, 0))

    log_sum = tl.log(
        tl.where(maximum > FLOOR, total, float("nan"))
    )  # no finite logit: no distribution
    target_logit = tl.load(target_logits + rows, mask=real, other=0.0)
    centred = target_logit - maximum
    out += rows
    tl.store(out, centred * inverse - log_sum, mask=real)
    tl.store(out + width, log_sum - moment * inverse / total, mask=real)
    tl.store(out + 2 * width, maximum, mask=real)
    tl.store(out + 3 * width, log_sum, mask=real)
    if SQUARES:
        last = 4 if second_inv_temperature is None else 6
        tl.store(out + last * width, square / (total * total), mask=real)
    if LOGIT_STATS:
        last = (4 if second_inv_temperature is None else 6) + SQUARES
        is_top1 = (target_logit >= maximum) & (target_logit > before)
        tl.store(out + last * width, logit_sum, mask=real)
        tl.store(out + (last + 1) * width, is_top1.to(tl.float32), mask=real)
    if second_inv_temperature is not None:
        second_log_sum = tl.log(tl.where(maximum > FLOOR, second_total, float("nan")))
        tl.store(out + 4 * width, centred * second_inverse - second_log_sum, mask=real)
        tl.store(out + 5 * width, second_log_sum, mask=real)


@triton.jit
def _inverses(inv_temperature, rows, real, PER_TOKEN: tl.constexpr):
    if PER_TOKEN:
        return tl.load(inv_temperature + rows, mask=real, other=1.0)
    else:
        return inv_temperature
