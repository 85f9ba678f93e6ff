"""Which backends exist, which can run here, and the rule behind backend="auto"."""

from __future__ import annotations

import os

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
