"""Large memory of a CPU in pages of 2 MiB: to touch it a first time costs a tenth of the faults."""

from __future__ import annotations

import ctypes
import functools
import sys

from torch import Tensor

_PAGE, _MADV_HUGEPAGE = 2**21, 14  # of Linux


def advise(tensor: Tensor) -> Tensor:
    """Ask Linux for huge pages within a new tensor; returns it, the same elsewhere."""
    if tensor.device.type != "cpu" or tensor.nbytes < _PAGE or (madvise := _madvise()) is None:
        return tensor
    start = -(-tensor.data_ptr() // _PAGE) * _PAGE
    stop = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
    madvise(start, stop - start, _MADV_HUGEPAGE)  # advice: a kernel without them may refuse it
    return tensor


@functools.cache
def _madvise():
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
