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


def row_stats(
    products: Tensor,
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
    count = len(products)
    first, second = (_per_row(x, count) for x in (inv_temperature, second_inv_temperature))
    assert first is not None
    softcap, scale = logit_map.softcap or 0.0, logit_map.scale
    found = _stats(products, targets, first, second, logit_map.bias, softcap, scale, squares)
    has_second = second is not None
    wanted = (True, True, True, True, has_second, has_second, squares)
    values = iter(found)
    return RowStats(*(next(values) if want else None for want in wanted))  # type: ignore[arg-type]


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
    count = len(products)
    first, second = (_per_row(x, count) for x in (inv_temperature, second_inv_temperature))
    assert first is not None
    softcap, scale = logit_map.softcap or 0.0, logit_map.scale
    _grad(
        products, targets, first, second, logit_map.bias, softcap, scale,
        list(stats), list(coefs), out, bias_grad,
    )  # fmt: skip


@torch.library.custom_op("aepo_kernels::cpu_sample_rows", mutates_args=(), device_types="cpu")
def sample_rows(logits: Tensor, inv_temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token of softmax(logits / T) per row by inverting its distribution.

    logits: [B, V] fp32, bf16 or fp16. inv_temperature: [B]. uniform: [B] in [0, 1), float64.
    Returns ids [B] int64, -1 where all logits are -inf or one is NaN, and their log-probs [B] fp32.
    """
    tokens = torch.empty(len(logits), dtype=torch.int64)
    logprobs = torch.empty(len(logits), dtype=torch.float32)
    given = _given(tokens, inv_temperature, None, None)
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
) -> list[Tensor]:
    """Those of RowStats that are wanted, in their order; softcap 0 is none."""
    given = _given(targets, inv_temperature, second_inv_temperature, bias)
    second = second_inv_temperature is not None
    wanted = (True, True, True, True, second, second, squares)
    found = [torch.empty(len(products)) if want else None for want in wanted]
    call("aepo_row_stats", _logits(products, given, softcap, scale), Stats(*map(_address, found)))
    return [x for x in found if x is not None]


@_stats.register_fake
def _(products: Tensor, *rest) -> list[Tensor]:
    count = 4 + 2 * (rest[2] is not None) + rest[-1]
    size = products.shape[:1]
    return [products.new_empty(size, dtype=torch.float32) for _ in range(count)]


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
    given = _given(targets, inv_temperature, second_inv_temperature, bias)
    # Kept by name: the library has only their addresses.
    known, factors = _given(None, *stats), _given(None, *coefs)
    call(
        "aepo_row_grad",
        _logits(products, given, softcap, scale),
        Stats(*map(_address, known[1:])),
        Coefs(*map(_address, factors[1:])),
        Grad(out.data_ptr(), DTYPES[out.dtype], out.stride(0), _address(bias_grad)),
    )


def _given(targets: Tensor | None, *values: Tensor | None) -> list[Tensor | None]:
    """The arguments as the library reads them: adjacent, and float32 but for the targets."""
    floats = [None if x is None else x.float().contiguous() for x in values]
    return [None if targets is None else targets.contiguous(), *floats]


def _logits(products: Tensor, given: list[Tensor | None], softcap: float, scale: float) -> Logits:
    """The C arguments; `given` (targets, temperatures, bias) has to outlive the call."""
    assert products.stride(1) == 1 or products.shape[1] == 1
    return Logits(
        products.data_ptr(),
        DTYPES[products.dtype],
        torch.get_num_threads(),
        *products.shape,
        products.stride(0),
        *map(_address, given),
        softcap,
        scale,
    )


def _per_row(value: float | Tensor | None, count: int) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value if value is None else value.float()
    return torch.full((count,), value, dtype=torch.float32)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
