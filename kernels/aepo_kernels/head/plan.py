"""How many tokens, and how much of the vocabulary, are in memory at once."""

from __future__ import annotations

import torch

from aepo_kernels import backends
from aepo_kernels.cpu import rows as cpu_rows
from aepo_kernels.gemm import GEMM_BYTES, in_cpp, is_widened
from aepo_kernels.problem import Problem

# Bytes of a chunk's logits, and its most tokens; larger chunks update the weight's fp32 gradient
# less often.
_CPU_CHUNK_BYTES, _CPU_CHUNK_TOKENS = 5 * 2**23, 1024
# Where no gradient follows: tokens, and with C++ rows columns, whose logits stay cached.
_CPU_SCORING_TOKENS, _CPU_SCORING_COLUMNS = 256, 16384
# In float32 more tokens by fewer columns: every call of its GEMMs lays the weight out anew.
_FLOAT32_SCORING = 4
_CPU_SLICE_BYTES, _ROW_BLOCK = 2**24, 2048
_CPU_SLICE_COLUMNS = 16384  # where they are rows of a GEMM's first operand
_CPU_SUM_BYTES = 28 * 2**20  # of hidden's gradient, added up beside what slices need
_CPU_WAITING_BYTES = 2**25  # of float16 logits that wait beside the weight's gradient
_GPU_CHUNK_BYTES, _GPU_CHUNK_TOKENS = 3 * 2**29, 8192
# "fused" is for small memory: its forward needs some 20 KB a token, and logits of few tokens exist
# in its backward.
_FUSED_FORWARD_TOKENS, _FUSED_CHUNK_BYTES = 4096, 2**28


def logits_dtype(problem: Problem) -> torch.dtype:
    """The dtype of the first GEMM's output: hidden's, or that of widened GEMMs."""
    if is_widened(problem.hidden):
        return torch.float32
    return problem.logits_dtype or problem.hidden.dtype


def logits_bytes(problem: Problem) -> int:
    """Bytes of a logit in a chunk, with its gradient where that is beside it."""
    width, hidden = logits_dtype(problem).itemsize, problem.hidden
    beside = hidden.device.type != "cpu" and width != hidden.element_size()
    return width + hidden.element_size() if beside else width


def chunk_size(problem: Problem) -> int:
    """Tokens whose logits exist at once: the caller's number, or what the memory budget holds."""
    if problem.chunk_tokens is not None:
        return problem.chunk_tokens
    hidden, width = problem.hidden, logits_bytes(problem)
    budget, most = _CPU_CHUNK_BYTES, _CPU_CHUNK_TOKENS
    if problem.backend == "chunked" and backends.gemms_want_columns(hidden):
        budget //= 2  # their gradient is written twice
    elif is_widened(hidden) or in_cpp(hidden):
        budget -= GEMM_BYTES
    if hidden.device.type != "cpu":
        budget, most = _GPU_CHUNK_BYTES, _GPU_CHUNK_TOKENS
    if problem.backend == "fused":
        budget = _FUSED_CHUNK_BYTES
    size = budget // (problem.chunk_vocab * width)
    step = 16 if hidden.device.type == "cpu" else 64
    return min(max(size // step * step, step), most)


def gradient_chunk_size(problem: Problem, needs_weight: bool, rows: int) -> int:
    """Tokens whose gradients are made at once, of so many.

    On a GPU chunks are equal, and one where its logits need no more memory than those of a chunk
    and the float32 sum of the weight's gradients, which it does without.
    """
    size = chunk_size(problem)
    if problem.hidden.device.type == "cpu" or problem.chunk_tokens is not None or rows <= size:
        return size
    weight = problem.weight
    plain = (problem.weight_grad, problem.row_sampling) == (None, None)
    at_once = problem.backend != "fused" or rows <= _FUSED_FORWARD_TOKENS
    if needs_weight and plain and at_once and weight.dtype == problem.hidden.dtype:
        spared = problem.stats_dtype.itemsize * weight.shape[1]  # bytes per row of weight
        if rows <= size + spared // logits_bytes(problem):
            return rows
    count = -(-rows // size)
    return -(-rows // (64 * count)) * 64


def slice_size(problem: Problem, needs_weight: bool, rows: int) -> int | None:
    """Rows of weight whose gradient is made at once, or None where chunks of tokens add it up.

    Slices are the caller's choice, or on a CPU that of GEMMs which take more than one chunk: to add
    up the weight's gradient would take more time, in half precision memory too. In float32 they pay
    where rows come by slices as well, so that few logits are made twice.
    """
    if problem.weight_slice is not None:
        return problem.weight_slice
    weight, hidden = problem.weight, problem.hidden
    plain = (problem.weight_grad, problem.row_sampling, problem.chunk_tokens) == (None, None, None)
    pays = hidden.dtype != problem.stats_dtype or backends.row_operations(hidden) is cpu_rows
    pays = pays and weight.dtype in (hidden.dtype, torch.float32)
    if not (needs_weight and plain and pays and hidden.device.type == "cpu"):
        return None
    if problem.backend != "chunked" or rows <= chunk_size(problem):
        return None
    most = _CPU_SLICE_COLUMNS if backends.gemms_want_columns(hidden) else len(weight)
    size = max(_CPU_SLICE_BYTES // (logits_dtype(problem).itemsize * rows) // 64 * 64, 64)
    size = min(size, most)
    # Multiples of the blocks in which rows are added up give the same bits as whole rows.
    return size if size < _ROW_BLOCK else size // _ROW_BLOCK * _ROW_BLOCK


def waiting_as_float16(problem: Problem, rows: int) -> tuple[int, int]:
    """Of so many rows, how many wait for slices as float16: in the weight's gradient, and beside.

    Those are widened ones of which too few would fit as they are.
    """
    hidden, weight = problem.hidden, problem.weight
    if problem.backend != "chunked" or not is_widened(hidden):
        return 0, 0
    if backends.row_operations(hidden) is not cpu_rows:
        return 0, 0
    lent, keeps = weight.shape[1] * weight.element_size(), keeps_logits(problem, rows)
    if rows <= lent // torch.float32.itemsize + (chunk_size(problem) if keeps else 0):
        return 0, 0
    inside = min(rows, lent // torch.float16.itemsize)
    held = _CPU_WAITING_BYTES // (torch.float16.itemsize * problem.chunk_vocab) if keeps else 0
    return inside, min(rows - inside, held)


def keeps_logits(problem: Problem, rows: int) -> bool:
    """Whether slices of so many rows take the last chunk's logits instead of making them again."""
    return (
        problem.hidden.device.type == "cpu" and _sum_bytes(problem, rows) <= _CPU_SLICE_BYTES // 4
    )


def goes_by_blocks(problem: Problem, rows: int, *, picked: bool = False) -> bool:
    """Whether slices take some of so many rows at a time, to keep memory within its bound.

    picked: slices would have a copy of those rows of hidden.
    """
    hidden = problem.hidden
    if hidden.device.type != "cpu" or problem.backend != "chunked":
        return False
    needed, most = _sum_bytes(problem, rows), _CPU_SUM_BYTES
    if picked:
        needed += rows * hidden.shape[1] * hidden.element_size()
        most += 0 if backends.gemms_want_columns(hidden) else _CPU_SLICE_BYTES // 2
    return needed > most


def _sum_bytes(problem: Problem, rows: int) -> int:
    """Bytes of the sum of hidden's gradient."""
    return problem.stats_dtype.itemsize * rows * problem.hidden.shape[1]


def forward_chunk_size(problem: Problem) -> int:
    """Tokens that go through the forward pass at once."""
    return _FUSED_FORWARD_TOKENS if problem.backend == "fused" else chunk_size(problem)


def scoring_chunk_size(problem: Problem) -> int:
    """The same where no gradient follows: on a CPU few enough for their logits to stay cached."""
    size = forward_chunk_size(problem)
    if problem.hidden.device.type != "cpu" or problem.chunk_tokens is not None:
        return size
    if backends.row_operations(problem.hidden) is not cpu_rows:
        return min(size, _CPU_SCORING_TOKENS)
    # By slices, whose size is no matter of V.
    is_float32 = logits_dtype(problem) == torch.float32
    return _CPU_SCORING_TOKENS * (_FLOAT32_SCORING if is_float32 else 1)


def scoring_columns(dtype: torch.dtype) -> int:
    """Columns of logits of that dtype that a CPU makes at once where no gradient follows."""
    return _CPU_SCORING_COLUMNS // (_FLOAT32_SCORING if dtype == torch.float32 else 1)
