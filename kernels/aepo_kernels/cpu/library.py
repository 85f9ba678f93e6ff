"""The C++ library of row operations: its C interface, csrc/cpu/rows.h, and its instruction sets.

Built with the package (CMakeLists.txt) and loaded by ctypes, so that one binary serves every torch.
AEPO_CPU_ISA names an instruction set other than the machine's best, or "torch" for torch's row
operations.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os

import torch

ISA_VARIABLE = "AEPO_CPU_ISA"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Logits(ctypes.Structure):
    _fields_ = [
        ("raw_logits", _POINTER),
        ("dtype", _INT),
        ("threads", _INT),
        ("rows", _LONG),
        ("vocab", _LONG),
        ("row_stride", _LONG),
        ("column_stride", _LONG),
        ("targets", _POINTER),
        ("inv_temperature", _POINTER),
        ("second_inv_temperature", _POINTER),
        ("bias", _POINTER),
        ("softcap", _FLOAT),
        ("scale", _FLOAT),
        ("base", _POINTER),
        ("picked", _POINTER),
    ]


class Stats(ctypes.Structure):
    _fields_ = [
        (name, _POINTER)
        for name in (
            "logprob entropy max_logit log_sum second_logprob second_log_sum sum_squares "
            "logit_sum is_top1".split()
        )
    ]


class State(ctypes.Structure):
    _fields_ = [("numbers", _POINTER), ("is_first", _INT), ("is_last", _INT)]


class Kept(ctypes.Structure):
    _fields_ = [("logits", _POINTER), ("row_stride", _LONG), ("base", _POINTER)]


class Coefs(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("logprob", "entropy", "lse", "second_logprob")]


class Sample(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("uniform", "token", "logprob")]


class Grad(ctypes.Structure):
    _fields_ = [
        ("out", _POINTER),
        ("dtype", _INT),
        ("row_stride", _LONG),
        ("column_stride", _LONG),
        ("bias_grad", _POINTER),
        ("row_major", _POINTER),
        ("row_major_stride", _LONG),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, None where `unavailable_reason` says why."""
    loaded = _load()
    if isinstance(loaded, str):
        return None
    loaded.aepo_isa_name.restype = ctypes.c_char_p
    loaded.aepo_row_stats.argtypes = [_POINTER, _POINTER, _POINTER, _POINTER, _INT]
    loaded.aepo_sample_rows.argtypes = [_POINTER, _POINTER, _INT]
    loaded.aepo_row_grad.argtypes = [_POINTER, _POINTER, _POINTER, _POINTER, _INT]
    return loaded


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library as it is loaded, or why it is not."""
    spec = importlib.util.find_spec("aepo_kernels._rows")
    if spec is None or spec.origin is None:
        return (
            "the package was built without its C++ part, as where no C++ compiler is found; "
            "`pip install -v` says why"
        )
    try:
        # It finds torch's OpenMP, which is in the process already: a second one would start
        # threads of its own.
        return ctypes.CDLL(spec.origin)
    except OSError as error:  # a torch of other make, on a system without libgomp.so.1
        return f"its C++ part does not load: {error}"


def instruction_sets() -> list[str]:
    """The instruction sets that are compiled in and that this machine runs, the fastest last."""
    loaded = library()
    names: list[str] = []
    while loaded is not None and (name := loaded.aepo_isa_name(len(names))) is not None:
        names.append(name.decode())
    return [name for number, name in enumerate(names) if loaded and loaded.aepo_isa_runs(number)]


def unavailable_reason() -> str | None:
    """Why the C++ library does not run on this CPU; None where it does."""
    if os.environ.get(ISA_VARIABLE) == "torch":
        return f"{ISA_VARIABLE} = torch"
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def chosen() -> str:
    """The instruction set in use. Raises ValueError if AEPO_CPU_ISA names one that cannot run."""
    return _choose(os.environ.get(ISA_VARIABLE))


@functools.cache
def _choose(name: str | None) -> str:
    known = instruction_sets()
    if name and name not in known:
        raise ValueError(f"{ISA_VARIABLE} = {name!r}: does not run here; use {', '.join(known)}")
    return name or known[-1]


@functools.cache
def _number(name: str) -> int:
    loaded = library()
    assert loaded is not None
    number = 0
    while loaded.aepo_isa_name(number) != name.encode():
        number += 1
    return number


def call(name: str, *arguments: ctypes.Structure) -> None:
    """Call a function of the library in the chosen instruction set.

    Raises TypeError where the library has no kernel for the arguments' dtypes and strides.
    """
    loaded = library()
    assert loaded is not None
    pointers = [ctypes.byref(argument) for argument in arguments]
    if getattr(loaded, name)(*pointers, _number(chosen())):
        raise TypeError(f"{name}: no kernel for these dtypes and strides")
