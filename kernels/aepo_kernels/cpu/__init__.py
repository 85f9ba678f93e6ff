"""The C++ library on a CPU: its rows, GEMMs and layers, called through ctypes.

Public are `unavailable_reason`, `draw_tokens` and the module `aepo_kernels.cpu.layers`.
"""

from aepo_kernels.cpu.library import unavailable_reason
from aepo_kernels.cpu.rows import draw_tokens

__all__ = ["draw_tokens", "unavailable_reason"]
