"""Pages of 2 MiB for large tensors of a CPU: touching them for the first time faults less often."""

from __future__ import annotations

import ctypes
import functools
import sys

from torch import Tensor

_PAGE, _MADV_HUGEPAGE = 2**21, 14  # of Linux
# glibc gives larger blocks a mapping of their own (DEFAULT_MMAP_THRESHOLD_MAX of its malloc, on 64
# bits). Smaller blocks share the heap, where other blocks would take a whole huge page each.
_LARGEST_IN_HEAP = 2**25


def advise(tensor: Tensor) -> Tensor:
    """Ask Linux for huge pages within a new tensor of the CPU; returns the tensor itself.

    Small tensors, and all tensors on other systems, stay as they are.
    """
    if tensor.nbytes <= _LARGEST_IN_HEAP or (madvise := _madvise()) is None:
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
