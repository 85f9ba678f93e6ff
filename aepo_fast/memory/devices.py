"""What memory a run has: the machine's own, or a card that is named by its size."""

from __future__ import annotations

import importlib
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import Config
from aepo_fast.memory.plan import Device
from aepo_fast.model.quantized import import_bitsandbytes
from aepo_fast.training.optim import OF_TORCHAO

# Libraries, threads and caches that a process on a CPU adds once a model loads, bytes; and what of
# the heap lies in holes, as a share of gradients and the optimizer's state. Fitted, with what
# `phases` says of freed activations, to bench/results/cpu/memory-fit-20261128-194052.json.
_LATER = 130 * 2**20
_HOLES = 0.2
# Of a GPU: the context with its kernels, and what the caching allocator cannot use. The context of
# an H100 takes about half a GiB. The share: not measured.
_CONTEXT = 600 * 2**20
_UNUSABLE = 0.03
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GiB|GB|MiB|MB)", re.IGNORECASE)
_UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}


def this_device(*, is_gpu: bool, ranks: int = 1, sharing: int = 1) -> Device:
    """The GPU of this process, or its part of this machine's memory for a run on its CPU.

    ranks: processes of the run. sharing: those on this machine.
    """
    if is_gpu:
        return _gpu(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    # malloc of one of several processes gives freed memory back: nothing lies in holes.
    holes = _HOLES if ranks == 1 else 0.0
    return Device(available_bytes(sharing), resident_bytes() + _LATER, counted=True, holes=holes)


def named_device(size: str) -> Device:
    """A GPU of some size, such as "24GiB"; raises ConfigError for what is no size."""
    found = _SIZE.fullmatch(size.strip())
    if found is None or float(found[1]) <= 0:
        raise ConfigError("--gpu", size, "is no size of memory", 'Use a number with unit: "24GiB"')
    return _gpu(round(float(found[1]) * _UNITS[found[2].lower()]))


def _gpu(memory: int) -> Device:
    return Device(memory, _CONTEXT, counted=False, holes=_UNUSABLE)


def import_packages(cfg: Config) -> None:
    """Import what a run of a configuration needs, so that the process has it when it is measured.

    What is not installed is left to the run's own checks.
    """
    names = [("torchao.optim", "torch._dynamo")] if cfg.trainer.optimizer in OF_TORCHAO else []
    if cfg.model.lora.rank:
        with suppress(ImportError):
            import_bitsandbytes()  # before peft does
        names += [("peft",)]
    for name in (name for group in names for name in group):
        with suppress(ImportError):
            importlib.import_module(name)


def resident_bytes() -> int:
    """Bytes of this process in memory, 0 where the system does not say."""
    return _kib("/proc/self/status", "VmRSS") * 1024


def available_bytes(sharing: int = 1) -> int:
    """Bytes that this process can have in all: its part of what is free here, and what it has.

    sharing: processes with which it shares what is free, itself among them. Where the system does
    not say, there is no limit.
    """
    limits = [sys.maxsize]
    free = _kib("/proc/meminfo", "MemAvailable") * 1024
    if free:
        limits.append(free // sharing + resident_bytes())
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(limit).strip()
        if text.isdigit():
            limits.append(int(text) // sharing)
    return min(limits)


def _kib(file: str, name: str) -> int:
    lines = (line.split() for line in _read(file).splitlines())
    return next((int(words[1]) for words in lines if words and words[0] == f"{name}:"), 0)


def _read(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""
