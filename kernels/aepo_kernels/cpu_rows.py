"""Row operations in C++ for the CPU; same interface as `aepo_kernels.rows`.

They compute in float32, sum in float64, and give the same bits for any number of threads. Each is
an operator, torch.ops.aepo_kernels.cpu_row_stats and so on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aepo_kernels.cpu_library import DTYPES, Coefs, Grad, Logits, Sample, Stats, call
from aepo_kernels.rows import LogitMap, RowCoefs, RowStats
from aepo_kernels.sliced_logits import SlicedLogits


def row_stats(
    products: Tensor | SlicedLogits,
    targets: Tensor,
    inv_temperature: float | Tensor,
    second_inv_temperature: float | Tensor | None,
    logit_map: LogitMap,
    dtype: torch.dtype,
    *,
    squares: bool = False,
) -> RowStats:
    """See `rows.row_stats`; dtype is torch.float32."""
    assert dtype == torch.float32
    law = _law(len(targets), inv_temperature, second_inv_temperature, logit_map)
    size = 0
    if isinstance(products, SlicedLogits):
        products, size = products.memory, products.size
    found = iter(_stats(products, targets, *law, squares, size))
    wanted = _wanted(second_inv_temperature is not None, squares)
    return RowStats(*(next(found) if want else None for want in wanted))  # type: ignore[arg-type]


def row_grad(
    products: Tensor,
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
    """See `rows.row_grad`."""
    law = _law(len(products), inv_temperature, second_inv_temperature, logit_map)
    _grad(products, targets, *law, list(stats), list(coefs), out, bias_grad)


@torch.library.custom_op("aepo_kernels::cpu_sample_rows", mutates_args=(), device_types="cpu")
def sample_rows(logits: Tensor, inv_temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token of softmax(logits / T) per row by inverting its distribution.

    logits: [B, V] fp32, bf16 or fp16. inv_temperature: [B]. uniform: [B] in [0, 1), float64.
    Returns ids [B] int64, -1 where all logits are -inf or one is NaN, and their log-probs [B] fp32.
    """
    tokens = torch.empty(len(logits), dtype=torch.int64)
    logprobs = torch.empty(len(logits), dtype=torch.float32)
    given = [tokens, *_floats(inv_temperature, None, None)]
    uniform = uniform.double().contiguous()
    sample = Sample(uniform.data_ptr(), tokens.data_ptr(), logprobs.data_ptr())
    call("aepo_sample_rows", _logits(logits, given, 0.0, 1.0), sample)
    return tokens, logprobs


@sample_rows.register_fake
def _(logits: Tensor, inv_temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    size = logits.shape[:1]
    return logits.new_empty(size, dtype=torch.int64), logits.new_empty(size, dtype=torch.float32)


@torch.library.custom_op("aepo_kernels::cpu_row_stats", mutates_args=(), device_types="cpu")
def _stats(
    products: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    second_inv_temperature: Tensor | None,
    bias: Tensor | None,
    softcap: float,
    scale: float,
    squares: bool,
    slice_size: int,
) -> list[Tensor]:
    """Those of RowStats that are wanted, in their order; softcap 0 is none.

    products: [C, V], or with a slice_size the memory of SlicedLogits.
    """
    law = _floats(inv_temperature, second_inv_temperature, bias)
    given = [targets.contiguous(), *law]
    wanted = _wanted(second_inv_temperature is not None, squares)
    found = [torch.empty(len(targets)) if want else None for want in wanted]
    logits = _logits(products, given, softcap, scale)
    if slice_size:
        logits.rows, logits.vocab = len(targets), len(products)
        logits.slice, logits.slice_room = slice_size, products.shape[1]
    call("aepo_row_stats", logits, Stats(*map(_address, found)))
    return [x for x in found if x is not None]


@_stats.register_fake
def _(products: Tensor, targets: Tensor, *rest) -> list[Tensor]:
    wanted = _wanted(rest[1] is not None, rest[-2])
    return [products.new_empty(len(targets), dtype=torch.float32) for want in wanted if want]


@torch.library.custom_op(
    "aepo_kernels::cpu_row_grad", mutates_args=("out", "bias_grad"), device_types="cpu"
)
def _grad(
    products: Tensor,
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
) -> None:
    """The gradient by the products into `out`, which may be the products themselves."""
    law = _floats(inv_temperature, second_inv_temperature, bias)
    given = [targets.contiguous(), *law]
    # Kept by name: the library has only their addresses.
    known, factors = _floats(*stats), _floats(*coefs)
    call(
        "aepo_row_grad",
        _logits(products, given, softcap, scale),
        Stats(*map(_address, known)),
        Coefs(*map(_address, factors)),
        Grad(out.data_ptr(), DTYPES[out.dtype], out.stride(0), _address(bias_grad)),
    )


def _wanted(second: bool, squares: bool) -> tuple[bool, ...]:
    """Which of RowStats there are."""
    return (True, True, True, True, second, second, squares)


def _floats(*values: Tensor | None) -> list[Tensor | None]:
    """Tensors as the library reads them: float32, adjacent."""
    return [None if x is None else x.float().contiguous() for x in values]


def _logits(products: Tensor, given: list[Tensor | None], softcap: float, scale: float) -> Logits:
    """The C arguments; `given` (targets, temperatures, bias) has to outlive the call."""
    assert products.stride(1) == 1 or products.shape[1] == 1
    return Logits(
        products.data_ptr(),
        DTYPES[products.dtype],
        torch.get_num_threads(),
        *products.shape,
        products.stride(0),
        0,
        0,
        *map(_address, given),
        softcap,
        scale,
    )


def _law(
    count: int, first: float | Tensor, second: float | Tensor | None, logit_map: LogitMap
) -> tuple[Tensor, Tensor | None, Tensor | None, float, float]:
    """The operators' arguments for each row's law: temperatures, bias, softcap, scale."""
    softcap, scale = logit_map.softcap or 0.0, logit_map.scale
    second = None if second is None else _per_row(second, count)
    return _per_row(first, count), second, logit_map.bias, softcap, scale


def _per_row(value: float | Tensor, count: int) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((count,), value, dtype=torch.float32)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
