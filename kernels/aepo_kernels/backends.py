"""Which backends exist, which can run where, and the rule behind backend="auto"."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType

import torch

from aepo_kernels.cpu import gemm as cpu_gemm
from aepo_kernels.cpu import library as cpu_library
from aepo_kernels.cpu import rows as cpu_rows
from aepo_kernels.rows import torch_rows

BACKEND_VARIABLE = "AEPO_KERNELS_BACKEND"
# Devices with kernels, by torch's names. AMD's GPUs are "cuda" as well.
DEVICES = "cpu", "cuda"


@dataclass(frozen=True)
class Features:
    """What a backend does, and which arguments it takes.

    autograd: all logits exist at once, and autograd differentiates them. fused: the forward pass
    writes no logits. Every other field is the name of an argument that the backend takes or
    refuses.
    """

    autograd: bool = False
    fused: bool = False
    lora: bool = True
    shard: bool = True
    weight_grad: bool = True
    weight_slice: bool = True
    row_sampling: bool = True
    kept_ids: bool = True


FEATURES = {
    "reference": Features(
        autograd=True, shard=False, weight_grad=False, weight_slice=False, row_sampling=False
    ),
    "chunked": Features(),
    "fused": Features(fused=True, lora=False, shard=False, weight_slice=False, kept_ids=False),
}


def backend_status(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Report every backend: its name, and None where it can run or the reason why it cannot.

    device: None is the first GPU where there is one, else the CPU.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    return {name: unavailable_reason(name, kind) for name in FEATURES}


def unavailable_reason(
    backend: str, device_type: str, dtype: torch.dtype = torch.float32
) -> str | None:
    """Why a backend cannot run with hidden states of a dtype; None where it can.

    device_type: of the hidden states. The kernels know "cpu" and "cuda"; "reference" is plain torch
    and takes every device that has numbers.
    """
    if device_type == "meta":
        return "hidden is on meta, where tensors have no numbers"
    if backend == "reference":
        return None
    if device_type not in DEVICES:
        return f"hidden is on {device_type}, and its kernels run on {' and '.join(DEVICES)}"
    if backend == "chunked" and device_type == "cpu":
        return None
    if importlib.util.find_spec("triton") is None:
        return "its kernels need triton, which is not installed: pip install triton"
    if backend == "fused" and device_type != "cuda" and not _interpreted():
        return "its kernels need a GPU"
    if backend == "fused" and dtype == torch.float64:
        return "its kernels compute in float32, and hidden is float64"
    return None


def resolve_backend(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """Turn the `backend` argument into the name of a backend for hidden states of this kind.

    "auto" is the value of AEPO_KERNELS_BACKEND where that variable is set, and otherwise always
    "chunked", on CPU and on CUDA. A named backend runs or raises ValueError; it is never replaced.
    """
    source, named = "backend", os.environ.get(BACKEND_VARIABLE)
    if backend == "auto":
        source, backend = (BACKEND_VARIABLE, named) if named else ("backend", "chunked")
    if backend not in FEATURES:
        raise ValueError(
            f"{source} = {backend!r}: no such backend; use one of {', '.join(FEATURES)}"
            + (" or auto" if source == "backend" else "")
        )
    reason = unavailable_reason(backend, device_type, dtype)
    if reason is not None:
        fix = "use another backend"
        if device_type not in DEVICES:
            fix = f"move all tensors to {' or '.join(DEVICES)}"
            fix += "" if device_type == "meta" else ', or use backend="reference"'
        raise ValueError(f"{source} = {backend!r}: cannot run here ({reason}); {fix}")
    return backend


def row_operations(hidden: torch.Tensor) -> ModuleType:
    """The module with `row_stats` and `row_grad` for logits of these hidden states.

    hidden: [N, H]. A GPU takes Triton's module, and a CPU the C++ one where the package was built
    with it. torch's module serves float64 and every other case.
    """
    if hidden.dtype == torch.float64:
        return torch_rows
    if hidden.is_cuda:
        return importlib.import_module("aepo_kernels.gpu.rows")
    return torch_rows if cpu_library.unavailable_reason() else cpu_rows


def gemms_want_column_major(hidden: torch.Tensor) -> bool:
    """Whether logits of these hidden states, [C, V], should be column-major: weight @ hidden.T.

    On a CPU with AMX, oneDNN's bfloat16 GEMMs read their first operand as it is laid out in memory
    and rearrange the second one. The second operand should be the small one: hidden.
    """
    narrow = hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu"
    return narrow and row_operations(hidden) is cpu_rows and _has_amx()


def upcasts_gemms(hidden: torch.Tensor) -> bool:
    """Whether GEMMs of these hidden states convert half-precision operands to float32.

    On a CPU they always convert float16, whose products no bfloat16 instruction serves.
    """
    if hidden.dtype == torch.float16:
        return hidden.device.type == "cpu"
    return hidden.dtype == torch.bfloat16 and not multiplies_bfloat16(hidden.device.type)


def gemms_in_cpp(hidden: torch.Tensor) -> bool:
    """Whether `cpu.gemm` multiplies these hidden states: float32, or what is upcast."""
    if hidden.device.type != "cpu" or not cpu_gemm.is_available():
        return False
    return hidden.dtype == torch.float32 or upcasts_gemms(hidden)


def writes_float32(hidden: torch.Tensor) -> bool:
    """Whether torch has GEMMs from half precision to float32 on the device of hidden states."""
    return hidden.is_cuda


def is_readable_at_once(tensor: torch.Tensor) -> bool:
    """Whether a look at a tensor's values waits for no device: checks look at such values alone."""
    return tensor.device.type == "cpu"


def multiplies_bfloat16(device_type: str) -> bool:
    """Whether a device has instructions for bfloat16 GEMMs; where not, float32 GEMMs are faster.

    device_type: "cpu" or "cuda". x86 has such instructions since AVX-512: on older CPUs torch
    multiplies the numbers one by one. 64-bit ARM has them since version 8.6.
    """
    return device_type != "cpu" or _cpu_multiplies_bfloat16()


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and supported()


@functools.cache
def _has_amx() -> bool:
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def row_kernels(
    device_type: str, dtype: torch.dtype = torch.float32, backend: str = "chunked"
) -> str:
    """Which row operations a backend runs: "triton", "c++ (avx512)" or "torch (why)".

    device_type: "cpu" or "cuda". dtype: of the hidden states.
    """
    if backend == "reference":
        return "torch"
    if dtype == torch.float64:
        return "torch (float64)"
    if device_type == "cuda" or backend == "fused":
        return "triton"
    reason = cpu_library.unavailable_reason()
    return f"torch ({reason})" if reason else f"c++ ({cpu_library.chosen()})"


def _interpreted() -> bool:
    """Whether Triton runs kernels in Python (TRITON_INTERPRET=1), on tensors of the CPU."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)
