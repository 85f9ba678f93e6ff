"""A trainer for Arbitrary Entropy Policy Optimization (AEPO) on top of `aepo_kernels`."""

from __future__ import annotations

from typing import Any

__version__: str


def __getattr__(name: str) -> Any:
    # Not at import: with the kernels comes torch, which a verifier and --help do without.
    if name == "__version__":
        from aepo_kernels import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
