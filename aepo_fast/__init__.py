"""A trainer for Arbitrary Entropy Policy Optimization (AEPO) on top of `aepo_kernels`."""

from __future__ import annotations

from typing import Any

__version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":  # only then: the kernels import torch, which a verifier does without
        from aepo_kernels import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
