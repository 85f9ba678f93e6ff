"""A trainer for Arbitrary Entropy Policy Optimization (AEPO) on top of `aepo_kernels`."""

from aepo_kernels import __version__

__all__ = ["__version__"]
