"""Matrix products in C++ that upcast half precision while they pack it (csrc/cpu/gemm.h)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from aepo_kernels.cpu import library as cpu_library
from aepo_kernels.cpu.library import DTYPES

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("data", _POINTER),
        ("dtype", _INT),
        ("row_stride", _LONG),
        ("column_stride", _LONG),
    ]


class _Gemm(ctypes.Structure):
    _fields_ = [
        ("left", _Matrix),
        ("right", _Matrix),
        ("out", _POINTER),
        ("dtype", _INT),
        ("threads", _INT),
        ("add", _INT),
        ("row_stride", _LONG),
        ("rows", _LONG),
        ("inner", _LONG),
        ("columns", _LONG),
    ]


def is_available() -> bool:
    """Whether these GEMMs run here: the package has its C++ part, and AVX2 is the CPU's best.

    On CPUs with wider vectors, these GEMMs were never measured against torch's float32 GEMMs.
    """
    return cpu_library.unavailable_reason() is None and cpu_library.chosen() == "avx2"


def multiply(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> Tensor:
    """Write left [M, K] @ right [K, N] into `out` [M, N], or add it; summed in float32.

    The result is rounded once. All three matrices may have any strides, and each of them any dtype
    of float32, bfloat16 and float16. Returns `out`. Raises KeyError for another dtype.
    """
    if out.stride(1) != 1 and out.shape[1] > 1:
        if out.stride(0) != 1:
            whole = out.contiguous()
            return out.copy_(multiply(whole, left, right, add=add))
        multiply(out.T, right.T, left.T, add=add)
        return out
    if not out.numel():
        return out
    if not left.shape[1]:
        return out if add else out.zero_()
    left, right = _adjacent(left), _adjacent(right)
    gemm = _Gemm(
        _matrix(left),
        _matrix(right),
        out.data_ptr(),
        DTYPES[out.dtype],
        torch.get_num_threads(),
        add,
        out.stride(0),
        *left.shape,
        right.shape[1],
    )
    library = cpu_library.library()
    assert library is not None
    if code := library.aepo_gemm(ctypes.byref(gemm)):
        raise RuntimeError(f"aepo_gemm returned {code}: see csrc/cpu/gemm.h")
    return out


def _adjacent(matrix: Tensor) -> Tensor:
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def _matrix(matrix: Tensor) -> _Matrix:
    return _Matrix(matrix.data_ptr(), DTYPES[matrix.dtype], *matrix.stride())
