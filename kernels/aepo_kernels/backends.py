"""Which backends exist, which can run here, and the rule behind backend="auto"."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch

from aepo_kernels import rows

BACKEND_VARIABLE = "AEPO_KERNELS_BACKEND"
_BACKENDS = ("reference", "chunked")


def backend_status() -> dict[str, str | None]:
    """Report every backend of this version: name -> None where it can run, else the reason."""
    return dict.fromkeys(_BACKENDS)


def resolve_backend(backend: str) -> str:
    """Turn the `backend` argument into a backend's name.

    "auto" is the value of AEPO_KERNELS_BACKEND where that variable is set, and otherwise always
    "chunked", on CPU and on CUDA. A named backend runs or raises ValueError; it is never replaced.
    """
    source = "backend"
    if backend == "auto":
        source = BACKEND_VARIABLE
        backend = os.environ.get(BACKEND_VARIABLE) or "chunked"
    status = backend_status()
    if backend not in status:
        raise ValueError(
            f"{source} = {backend!r}: no such backend; use one of {', '.join(status)}"
            + (" or auto" if source == "backend" else "")
        )
    if status[backend] is not None:
        raise ValueError(
            f"{source} = {backend!r}: cannot run here ({status[backend]}); use another backend"
        )
    return backend


def row_module(hidden: torch.Tensor) -> ModuleType:
    """The row operations for `hidden`: Triton's on CUDA, except in float64, and torch's elsewhere.

    Raises RuntimeError on CUDA without Triton, which torch's CUDA builds bring along.
    """
    if not hidden.is_cuda or hidden.dtype == torch.float64:
        return rows
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "backend = 'chunked': Triton is not installed, and its row kernels need it on CUDA; "
            "install the triton of your torch, or use backend = 'reference'"
        )
    from aepo_kernels import triton_rows

    return triton_rows
