"""Row operations in C++ for the CPU; same interface as `aepo_kernels.rows.torch_rows`.

Raw logits [C, V] are row-major or, in bfloat16, column-major: the transpose of a contiguous matrix.
The operations compute in float32 and sum in float64. Their bits do not depend on the number of
threads. Each is an operator, torch.ops.aepo_kernels.cpu_row_stats and so on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aepo_kernels.cpu.library import DTYPES, Coefs, Grad, Kept, Logits, Sample, State, Stats, call
from aepo_kernels.rows.interface import LogitMap, RowCoefs, RowStats

_STATE_SIZE = 8  # of rows.h
# Operators are defined and implemented by hand. torch.library.custom_op would wrap each call in
# some 0.2 ms of Python, and a head makes hundreds of calls.
_LIBRARY = torch.library.Library("aepo_kernels", "FRAGMENT")
_DISTRIBUTION = (
    "Tensor inv_temperature, Tensor? second_inv_temperature, Tensor? bias, float softcap, "
    "float scale"
)
_LIBRARY.define(
    "cpu_sample_rows(Tensor logits, Tensor inv_temperature, Tensor uniform) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    f"cpu_row_stats(Tensor raw_logits, Tensor targets, {_DISTRIBUTION}, "
    "bool squares, bool logit_stats, Tensor(a!)? state, bool is_first, bool is_last, "
    "Tensor(b!)? kept, Tensor(c!)? base) -> Tensor[]"
)
_LIBRARY.define(
    f"cpu_row_grad(Tensor raw_logits, Tensor targets, {_DISTRIBUTION}, "
    "Tensor?[] stats, Tensor?[] coefs, Tensor(a!) out, Tensor(b!)? bias_grad, "
    "Tensor(c!)? row_major, Tensor? base, Tensor? picked) -> ()"
)


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
    state: Tensor | None = None,
    is_first: bool = True,
    is_last: bool = True,
    kept: Tensor | None = None,
    base: Tensor | None = None,
) -> RowStats | None:
    """See `torch_rows.row_stats`; dtype is torch.float32.

    Rows may come one slice of their columns after the other, with a `state` from `new_state` and
    targets of -1 for tokens outside the slice. The last slice gives the statistics of whole rows,
    every other slice gives None. The bits are those of whole rows where each slice but the last is
    a multiple of 2048 columns.

    kept, base: [C, V] float16 and [C] float32. They become the logits less a base per row, and the
    bases, for `row_grad`. Raw logits and `kept` are then row-major. The base is a row's largest
    logit so far, so that float16 rounds the largest logits least.
    """
    assert dtype == torch.float32
    distribution = _distribution(
        len(raw_logits), inv_temperature, second_inv_temperature, logit_map
    )
    wants = squares, logit_stats
    given = raw_logits, targets, *distribution, *wants, state, is_first, is_last, kept, base
    found = iter(torch.ops.aepo_kernels.cpu_row_stats(*given))
    wanted = _wanted(second_inv_temperature is not None, *wants)
    if not is_last:
        return None
    return RowStats(*(next(found) if want else None for want in wanted))  # type: ignore[arg-type]


def new_state(count: int) -> Tensor:
    """What `row_stats` keeps of so many rows from slice to slice: [count, 8] float64."""
    return torch.empty(count, _STATE_SIZE, dtype=torch.float64)


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
    row_major: Tensor | None = None,
    base: Tensor | None = None,
    picked: Tensor | None = None,
) -> None:
    """See `torch_rows.row_grad`.

    row_major: [C, V], gets a row-major copy of the gradient where `out` is column-major. base: [T],
    says that raw_logits [T, V] are what `row_stats` kept with this base. picked: [C] int64, the
    rows of raw_logits and base to take; None takes all.
    """
    distribution = _distribution(len(targets), inv_temperature, second_inv_temperature, logit_map)
    given = (
        raw_logits,
        targets,
        *distribution,
        list(stats),
        list(coefs),
        out,
        bias_grad,
        row_major,
        base,
        picked,
    )
    torch.ops.aepo_kernels.cpu_row_grad(*given)


def draw_tokens(logits: Tensor, inv_temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token of softmax(logits / T) per row by inverting its distribution.

    logits: [B, V] fp32, bf16 or fp16. inv_temperature: [B]. uniform: [B] in [0, 1), float64.
    Returns ids [B] int64, -1 where all logits are -inf or one is NaN, and their log-probs [B] fp32.
    """
    return torch.ops.aepo_kernels.cpu_sample_rows(logits, inv_temperature, uniform)


@torch.library.impl(_LIBRARY, "cpu_sample_rows", "CPU")
def _sample(logits: Tensor, inv_temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens = logits.new_empty(len(logits), dtype=torch.int64)
    logprobs = logits.new_empty(len(logits), dtype=torch.float32)
    given = [tokens, *_floats(inv_temperature, None, None)]
    uniform = uniform.double().contiguous()
    sample = Sample(uniform.data_ptr(), tokens.data_ptr(), logprobs.data_ptr())
    call("aepo_sample_rows", _logits(logits, given, 0.0, 1.0), sample)
    return tokens, logprobs


@torch.library.register_fake("aepo_kernels::cpu_sample_rows")
def _(logits: Tensor, inv_temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    size = logits.shape[:1]
    return logits.new_empty(size, dtype=torch.int64), logits.new_empty(size, dtype=torch.float32)


@torch.library.impl(_LIBRARY, "cpu_row_stats", "CPU")
def _stats(
    raw_logits: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    second_inv_temperature: Tensor | None,
    bias: Tensor | None,
    softcap: float,
    scale: float,
    squares: bool,
    logit_stats: bool,
    state: Tensor | None,
    is_first: bool,
    is_last: bool,
    kept: Tensor | None,
    base: Tensor | None,
) -> list[Tensor]:
    """The wanted fields of RowStats in order, [C] each; empty before the last slice.

    softcap: 0 is none.
    """
    distribution = _floats(inv_temperature, second_inv_temperature, bias)
    given = [targets.contiguous(), *distribution]
    wanted = _wanted(second_inv_temperature is not None, squares, logit_stats)
    found = [
        raw_logits.new_empty(len(raw_logits), dtype=torch.float32) if want else None
        for want in wanted
    ]
    call(
        "aepo_row_stats",
        _logits(raw_logits, given, softcap, scale),
        Stats(*map(_address, found)),
        State(_address(state), is_first, is_last),
        Kept(_address(kept), 0 if kept is None else kept.stride(0), _address(base)),
    )
    return [x for x in found if x is not None] if is_last else []


@torch.library.register_fake("aepo_kernels::cpu_row_stats")
def _(raw_logits: Tensor, *rest) -> list[Tensor]:
    size, (squares, logit_stats, _, _, is_last) = raw_logits.shape[:1], rest[-7:-2]
    wanted = _wanted(rest[2] is not None, squares, logit_stats)
    made = [raw_logits.new_empty(size, dtype=torch.float32) for want in wanted if want]
    return made if is_last else []


@torch.library.impl(_LIBRARY, "cpu_row_grad", "CPU")
def _grad(
    raw_logits: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    second_inv_temperature: Tensor | None,
    bias: Tensor | None,
    softcap: float,
    scale: float,
    stats: Sequence[Tensor | None],
    coefs: Sequence[Tensor | None],
    out: Tensor,
    bias_grad: Tensor | None,
    row_major: Tensor | None,
    base: Tensor | None,
    picked: Tensor | None,
) -> None:
    """The gradient by the raw_logits into `out`, which may be the raw_logits themselves."""
    distribution = _floats(inv_temperature, second_inv_temperature, bias)
    given = [targets.contiguous(), *distribution]
    # Kept by name: the library has only their addresses.
    known, factors = _floats(*stats), _floats(*coefs)
    call(
        "aepo_row_grad",
        _logits(raw_logits, given, softcap, scale, base, picked),
        Stats(*map(_address, known)),
        Coefs(*map(_address, factors)),
        Grad(
            out.data_ptr(),
            DTYPES[out.dtype],
            *_strides(out),
            _address(bias_grad),
            _address(row_major),
            0 if row_major is None else row_major.stride(0),
        ),
    )
    if row_major is not None and _strides(raw_logits)[1] == _strides(out)[1] == 1:
        row_major.copy_(out)  # one row, or one column, is laid out both ways


def _wanted(second: bool, squares: bool, logit_stats: bool) -> tuple[bool, ...]:
    """Which fields of RowStats are computed."""
    return (True, True, True, True, second, second, squares, logit_stats, logit_stats)


def _floats(*values: Tensor | None) -> list[Tensor | None]:
    """Tensors as the library reads them: float32 and contiguous."""
    return [None if x is None else x.float().contiguous() for x in values]


def _logits(
    raw_logits: Tensor,
    given: list[Tensor | None],
    softcap: float,
    scale: float,
    base: Tensor | None = None,
    picked: Tensor | None = None,
) -> Logits:
    """The C arguments. The caller keeps `given` alive: targets, temperatures and bias."""
    return Logits(
        raw_logits.data_ptr(),
        DTYPES[raw_logits.dtype],
        torch.get_num_threads(),
        len(raw_logits) if picked is None else len(picked),
        raw_logits.shape[1],
        *_strides(raw_logits),
        *map(_address, given),
        softcap,
        scale,
        _address(base),
        _address(picked),
    )


def _strides(matrix: Tensor) -> tuple[int, int]:
    """A matrix's strides of rows and of columns: (n, 1) is row-major, (1, n) column-major."""
    if matrix.stride(1) == 1 or matrix.shape[1] == 1:
        return matrix.stride(0), 1
    if matrix.stride(0) != 1 and matrix.shape[0] != 1:
        raise ValueError(f"strides {matrix.stride()}: a matrix lies by rows or by columns")
    return 1, matrix.stride(1)


def _distribution(
    count: int, first: float | Tensor, second: float | Tensor | None, logit_map: LogitMap
) -> tuple[Tensor, Tensor | None, Tensor | None, float, float]:
    """The operators' arguments for each row's distribution: temperatures, bias, softcap, scale."""
    softcap, scale = logit_map.softcap or 0.0, logit_map.scale
    second = None if second is None else _per_row(second, count)
    return _per_row(first, count), second, logit_map.bias, softcap, scale


def _per_row(value: float | Tensor, count: int) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((count,), value, dtype=torch.float32, device="cpu")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
