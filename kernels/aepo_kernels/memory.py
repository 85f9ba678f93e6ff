"""Large tensors on a CPU in huge pages: the first touch of small ones costs more than the work."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_LEAST_BYTES, _PAGE, _MADV_HUGEPAGE = 2**23, 4096, 14


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty, on a CPU in huge pages where Linux grants them to those who ask."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    if device.type == "cpu" and tensor.nbytes >= _LEAST_BYTES and sys.platform == "linux":
        start = -(-tensor.data_ptr() // _PAGE) * _PAGE
        size = (tensor.data_ptr() + tensor.nbytes - start) // _PAGE * _PAGE
        # A kernel without them says no, which changes nothing.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return tensor
