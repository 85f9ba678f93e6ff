"""What a transformer's layers do between their GEMMs, in C++ for the CPU, with gradients.

This module is public. torch runs each of these layers as several operations that write their
results to memory; the functions here read their input once. They compute in float32 and round once.
Tensors are float32, bfloat16 or float16. Bits do not depend on the number of threads. Where the C++
part is missing, every function raises: see `aepo_kernels.cpu.unavailable_reason`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aepo_kernels.cpu.library import DTYPES, call
from aepo_kernels.tensors import first_order, is_fake, unreadable_reason

_INSTEAD = "compute the layer with torch's own operations"
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def _fields(**kinds: str) -> list[tuple[str, Any]]:
    types = {"pointers": _POINTER, "ints": _INT, "longs": _LONG, "floats": _FLOAT}
    return [(name, types[kind]) for kind, names in kinds.items() for name in names.split()]


class _Norm(ctypes.Structure):  # these follow csrc/cpu/layers.h
    _fields_ = _fields(
        pointers="x weight out rstd x_grad weight_grad",
        ints="dtype weight_dtype out_dtype threads",
        longs="rows columns",
        floats="eps",
    )


class _Swiglu(ctypes.Structure):
    _fields_ = _fields(
        pointers="gate up out gate_grad up_grad", ints="dtype threads", longs="count"
    )


class _Rotary(ctypes.Structure):
    _fields_ = [
        *_fields(
            pointers="x cos sin out",
            ints="dtype angle_dtype threads transpose",
            longs="batch heads length width",
        ),
        ("x_strides", _LONG * 3),
        ("out_strides", _LONG * 3),
        ("angle_strides", _LONG * 2),
    ]


class _Decode(ctypes.Structure):
    _fields_ = [
        *_fields(
            pointers="q k v mask out",
            ints="dtype mask_dtype threads",
            floats="scale",
            longs="batch heads shared keys width",
        ),
        ("q_strides", _LONG * 2),
        ("k_strides", _LONG * 3),
        ("v_strides", _LONG * 3),
        ("out_strides", _LONG * 2),
        ("mask_stride", _LONG),
    ]


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """RMS norm over the last dimension: weight * x / sqrt(mean(x^2) + eps).

    x: [..., C]. weight: [C]. dtype: of the result; None is x's. Both inputs get a gradient. Raises
    TypeError for tensors not on the CPU or of another dtype, ValueError for shapes that do not fit.
    Formula: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """
    _check(x, weight)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {list(weight.shape)}: does not fit x {list(x.shape)}")
    if not torch.is_grad_enabled():
        return _normed(x.contiguous(), weight.contiguous(), eps, dtype or x.dtype)[0]
    return _RmsNorm.apply(x, weight, eps, dtype or x.dtype)  # type: ignore[return-value]


def _normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, dtype=dtype)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    _run("aepo_rms_norm", _norm, x, weight, out, rstd, None, None, eps)
    return out, rstd


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        out, rstd = _normed(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps = eps
        return out

    @staticmethod
    @first_order("rms_norm", _INSTEAD)
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        out_grad = grads[0].contiguous()
        x_grad = torch.empty_like(x)
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = torch.empty_like(weight, dtype=torch.float32)
        given = x, weight, out_grad, rstd, x_grad, weight_grad, ctx.eps
        _run("aepo_rms_norm_grad", _norm, *given)
        return x_grad, None if weight_grad is None else weight_grad.to(weight.dtype), None, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in the inputs' dtype.

    gate, up: any one shape and dtype. Both inputs get a gradient. Raises TypeError for tensors not
    on the CPU or of another dtype, ValueError where the two differ in shape or dtype. Formula:
    Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    _check(gate, up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate is {list(gate.shape)} {gate.dtype}, up {list(up.shape)} {up.dtype}: "
            "they must be alike"
        )
    if not torch.is_grad_enabled():
        return _gated(gate.contiguous(), up.contiguous())
    return _SwigluFunction.apply(gate, up)  # type: ignore[return-value]


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    _run("aepo_swiglu", _swiglu, gate, up, out, None, None)
    return out


class _SwigluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @first_order("swiglu", _INSTEAD)
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gate_grad, up_grad = torch.empty_like(gate), torch.empty_like(up)
        out_grad = grads[0].contiguous()  # kept by name: the library has only its address
        _run("aepo_swiglu_grad", _swiglu, gate, up, out_grad, gate_grad, up_grad)
        return gate_grad, up_grad


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of the two halves of x: x * cos + (-x_2, x_1) * sin, in x's dtype.

    x: [B, heads, L, D], D even, any strides. cos, sin: [B or 1, L, D], without a gradient. Returns
    a contiguous tensor; the gradient by x is contiguous as [B, L, heads, D]. Raises TypeError for
    tensors not on the CPU or of another dtype, ValueError for shapes that do not fit. Formula: Su
    et al., "RoFormer" (2021), with a head's first and second half in place of neighbouring pairs.
    """
    _check(x, cos, sin)
    batch, _, length, width = x.shape
    fits = cos.shape[0] in (1, batch) and cos.shape[1:] == (length, width)
    if not fits or cos.shape != sin.shape or cos.dtype != sin.dtype or width % 2:
        raise ValueError(
            f"cos {list(cos.shape)}, sin {list(sin.shape)}: do not fit x {list(x.shape)}"
        )
    if not torch.is_grad_enabled():
        return _rotate(x, cos.contiguous(), sin.contiguous(), x.new_empty(x.shape), transpose=False)
    return _RotaryFunction.apply(x, cos, sin)  # type: ignore[return-value]


class _RotaryFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, x.new_empty(x.shape), transpose=False)

    @staticmethod
    @first_order("rotary", _INSTEAD)
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        batch, heads, length, width = grad.shape
        x_grad = grad.new_empty(batch, length, heads, width).transpose(1, 2)
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, x_grad, transpose=True), None, None


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention of one query per row and head, softmax(scale q k^T + mask) v, without a gradient.

    query: [B, heads, D]. key, value: [B, shared heads, S, D], any strides but the last. mask: [B or
    1, S], added to the scores. Returns [B, heads, D] in query's dtype, 0 where all keys are masked.
    Raises TypeError for tensors not on the CPU or of another dtype, ValueError for shapes or dtypes
    that do not fit.
    """
    _check(query, key, value, *([] if mask is None else [mask]), takes_fake=False)
    batch, heads, width = query.shape
    shared, keys = key.shape[1:3]
    fits = key.shape == value.shape == (batch, shared, keys, width) and heads % shared == 0
    fits &= query.dtype == key.dtype == value.dtype
    fits &= mask is None or (mask.shape[0] in (1, batch) and mask.shape[1:] == (keys,))
    if not fits:
        raise ValueError(
            f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}, mask "
            f"{None if mask is None else list(mask.shape)}: shapes or dtypes do not fit"
        )
    query, key, value = (_adjacent(x) for x in (query, key, value))
    mask = None if mask is None else _adjacent(mask)
    out = query.new_empty(query.shape)
    call(
        "aepo_decode",
        _Decode(
            *(x.data_ptr() for x in (query, key, value)),
            None if mask is None else mask.data_ptr(),
            out.data_ptr(),
            DTYPES[query.dtype],
            0 if mask is None else DTYPES[mask.dtype],
            torch.get_num_threads(),
            scale,
            *(batch, heads, shared, keys, width),
            query.stride()[:2],
            key.stride()[:3],
            value.stride()[:3],
            out.stride()[:2],
            0 if mask is None or len(mask) == 1 else mask.stride(0),
        ),
    )
    return out


def _check(*tensors: Tensor, takes_fake: bool = True) -> None:
    # The library gets addresses. The address of another device's memory would end the process. So
    # this public function asks for the device itself: no plan was made before it.
    for tensor in tensors:
        if takes_fake and is_fake(tensor):
            continue
        if tensor.device.type != "cpu" or tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype) for dtype in DTYPES)
            raise TypeError(f"got {tensor.dtype} on {tensor.device}: use {known} on the CPU")
        if (reason := unreadable_reason(tensor)) is not None:
            raise TypeError(f"got a {type(tensor).__name__}, which {reason}")


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _run(name: str, structure: Callable[..., ctypes.Structure], *arguments: Any) -> None:
    """Call a function of the library with the structure of some arguments, the first a tensor.

    torch's fake tensors have shapes and no numbers: with them, memory is only made.
    """
    if not is_fake(arguments[0]):
        call(name, structure(*arguments))


def _norm(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    rstd: Tensor,
    x_grad: Tensor | None,
    weight_grad: Tensor | None,
    eps: float,
) -> _Norm:
    columns = x.shape[-1]
    return _Norm(
        *(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rstd.data_ptr()),
        *(None if grad is None else grad.data_ptr() for grad in (x_grad, weight_grad)),
        *(DTYPES[tensor.dtype] for tensor in (x, weight, out)),
        torch.get_num_threads(),
        x.numel() // max(columns, 1),
        columns,
        eps,
    )


def _swiglu(
    gate: Tensor, up: Tensor, out: Tensor, gate_grad: Tensor | None, up_grad: Tensor | None
) -> _Swiglu:
    return _Swiglu(
        *(gate.data_ptr(), up.data_ptr(), out.data_ptr()),
        *(None if grad is None else grad.data_ptr() for grad in (gate_grad, up_grad)),
        DTYPES[gate.dtype],
        torch.get_num_threads(),
        gate.numel(),
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, transpose: bool) -> Tensor:
    x = _adjacent(x)
    _run("aepo_rotary", _rotary, x, cos, sin, out, transpose)
    return out


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, transpose: bool) -> _Rotary:
    return _Rotary(
        *(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr()),
        *(DTYPES[x.dtype], DTYPES[cos.dtype], torch.get_num_threads(), transpose),
        *x.shape,
        x.stride()[:3],
        out.stride()[:3],
        (0 if len(cos) == 1 else cos.stride(0), cos.stride(1)),
    )
