"""Row operations in C++ for the CPU; same interface as `aepo_kernels.rows`.

The library is built with the package (CMakeLists.txt) and loaded by its C interface,
csrc/cpu/rows.h, so that one binary serves every torch. It computes in float32, sums in float64, and
gives the same bits for any number of threads. AEPO_CPU_ISA names an instruction set other than the
machine's best, or "torch" for torch's row operations.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os

import torch
from torch import Tensor

from aepo_kernels.rows import LogitMap, RowCoefs, RowStats

ISA_VARIABLE = "AEPO_CPU_ISA"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _Logits(ctypes.Structure):
    _fields_ = [
        ("products", _POINTER),
        ("dtype", _INT),
        ("threads", _INT),
        ("rows", _LONG),
        ("vocab", _LONG),
        ("row_stride", _LONG),
        ("targets", _POINTER),
        ("inv_temperature", _POINTER),
        ("second_inv_temperature", _POINTER),
        ("bias", _POINTER),
        ("softcap", _FLOAT),
        ("scale", _FLOAT),
    ]


class _Stats(ctypes.Structure):
    _fields_ = [
        (name, _POINTER)
        for name in (
            "logprob entropy max_logit log_sum second_logprob second_log_sum sum_squares".split()
        )
    ]


class _Coefs(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("logprob", "entropy", "lse", "second_logprob")]


class _Sample(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("uniform", "token", "logprob")]


class _Grad(ctypes.Structure):
    _fields_ = [("out", _POINTER), ("dtype", _INT), ("row_stride", _LONG), ("bias_grad", _POINTER)]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, None where the package was built without it."""
    spec = importlib.util.find_spec("aepo_kernels._rows")
    if spec is None or spec.origin is None:
        return None
    loaded = ctypes.CDLL(spec.origin)
    loaded.aepo_isa_name.restype = ctypes.c_char_p
    loaded.aepo_row_stats.argtypes = [_POINTER, _POINTER, _INT]
    loaded.aepo_sample_rows.argtypes = [_POINTER, _POINTER, _INT]
    loaded.aepo_row_grad.argtypes = [_POINTER, _POINTER, _POINTER, _POINTER, _INT]
    return loaded


def instruction_sets() -> list[str]:
    """Those compiled in that this machine runs, the fastest last."""
    loaded = library()
    names: list[str] = []
    while loaded is not None and (name := loaded.aepo_isa_name(len(names))) is not None:
        names.append(name.decode())
    return [name for number, name in enumerate(names) if loaded and loaded.aepo_isa_runs(number)]


def unavailable_reason() -> str | None:
    """Why torch's row operations run on the CPU instead of these; None where these do."""
    if os.environ.get(ISA_VARIABLE) == "torch":
        return f"{ISA_VARIABLE} = torch"
    if library() is None:
        return "the package was built without its C++ part, as where no C++ compiler is found"
    return None


def chosen() -> str:
    """The instruction set in use; raises ValueError where AEPO_CPU_ISA names none that runs."""
    known = instruction_sets()
    name = os.environ.get(ISA_VARIABLE) or known[-1]
    if name not in known:
        raise ValueError(f"{ISA_VARIABLE} = {name!r}: does not run here; use {', '.join(known)}")
    return name


@functools.cache
def _number(name: str) -> int:
    loaded = library()
    assert loaded is not None
    number = 0
    while loaded.aepo_isa_name(number) != name.encode():
        number += 1
    return number


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
    second = second_inv_temperature is not None
    wanted = (True, True, True, True, second, second, squares)
    found = [torch.empty(count, dtype=dtype) if want else None for want in wanted]
    logits, keep = _logits(products, targets, inv_temperature, second_inv_temperature, logit_map)
    stats = _Stats(*map(_address, found))
    _call("aepo_row_stats", logits, stats)
    del keep
    return RowStats(*found)  # type: ignore[arg-type]


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
    logits, keep = _logits(products, targets, inv_temperature, second_inv_temperature, logit_map)
    known = RowStats(*(None if x is None else x.contiguous() for x in stats))  # type: ignore[arg-type]
    given = RowCoefs(*(None if x is None else x.float().contiguous() for x in coefs))
    grad = _Grad(out.data_ptr(), _DTYPES[out.dtype], out.stride(0), _address(bias_grad))
    _call(
        "aepo_row_grad",
        logits,
        _Stats(*map(_address, known)),
        _Coefs(*map(_address, given)),
        grad,
    )
    del keep, known, given


def sample_rows(logits: Tensor, inv_temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token of softmax(logits / T) per row by inverting its distribution.

    logits: [B, V] fp32, bf16 or fp16. inv_temperature: [B]. uniform: [B] in [0, 1), float64.
    Returns ids [B] int64, -1 where all logits are -inf or one is NaN, and their log-probs [B] fp32.
    """
    tokens = torch.empty(len(logits), dtype=torch.int64)
    logprobs = torch.empty(len(logits), dtype=torch.float32)
    plain = LogitMap(None, None, 1.0)
    arguments, keep = _logits(logits, tokens, inv_temperature, None, plain)
    uniform = uniform.double().contiguous()
    sample = _Sample(uniform.data_ptr(), tokens.data_ptr(), logprobs.data_ptr())
    _call("aepo_sample_rows", arguments, sample)
    del keep
    return tokens, logprobs


def _logits(
    products: Tensor,
    targets: Tensor,
    inv_temperature: float | Tensor,
    second_inv_temperature: float | Tensor | None,
    logit_map: LogitMap,
) -> tuple[_Logits, list[Tensor | None]]:
    """The C arguments, and the tensors that have to outlive the call."""
    assert products.stride(1) == 1 or products.shape[1] == 1
    count, vocab = products.shape
    first = _per_row(inv_temperature, count)
    second = None
    if second_inv_temperature is not None:
        second = _per_row(second_inv_temperature, count)
    bias = None if logit_map.bias is None else logit_map.bias.float().contiguous()
    targets = targets.contiguous()
    keep = [targets, first, second, bias]
    return _Logits(
        products.data_ptr(),
        _DTYPES[products.dtype],
        torch.get_num_threads(),
        count,
        vocab,
        products.stride(0),
        *map(_address, keep),
        logit_map.softcap or 0.0,
        logit_map.scale,
    ), keep


def _per_row(value: float | Tensor, count: int) -> Tensor:
    if isinstance(value, Tensor):
        return value.float().contiguous()
    return torch.full((count,), value, dtype=torch.float32)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(name: str, *arguments: ctypes.Structure) -> None:
    loaded = library()
    assert loaded is not None
    pointers = [ctypes.byref(argument) for argument in arguments]
    if getattr(loaded, name)(*pointers, _number(chosen())):
        raise TypeError(f"{name}: no kernel for this dtype")
