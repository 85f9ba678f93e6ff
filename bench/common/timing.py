"""Timing: interleaved rounds, a flushed cache before each call, CUDA events on CUDA."""

from __future__ import annotations

import ctypes
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CPU_FLUSH_BYTES = 64 * 2**20
# More than any L2, so that a candidate's first kernels are launched while this is overwritten.
CUDA_FLUSH_BYTES = 2**30


class Stopwatch:
    """Times single calls on one device, each after its caches were overwritten."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush_bytes = CUDA_FLUSH_BYTES if device.type == "cuda" else CPU_FLUSH_BYTES
        self.buffer = torch.empty(self.flush_bytes, dtype=torch.int8, device=device)
        self.gave_back = False

    def time_ms(self, call: Callable[[], None], before: Callable[[], None]) -> float:
        """Milliseconds that one call takes; `before` runs ahead of it, untimed."""
        before()
        if self.gave_back:  # to ask the driver for memory takes longer than a call
            call()
            before()
            self.gave_back = False
        self.buffer.zero_()
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        first = torch.cuda.Event(enable_timing=True)
        last = torch.cuda.Event(enable_timing=True)
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)

    def give_back(self) -> None:
        """Free cached memory of a GPU for other processes; the next call is made twice."""
        if self.device.type == "cuda":
            release(self.device)
            self.gave_back = True

    def give_back_if_scarce(self) -> None:
        """The same where less than half of the GPU's memory is free."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            if free < total / 2:
                self.give_back()


def interleave(
    timers: dict[str, Callable[[], float]],
    device: torch.device,
    *,
    rounds: int,
    seed: int,
    deadline: float,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Call every timer, which returns milliseconds, once a round, in an order drawn anew.

    Returns milliseconds by name, and messages of timers that raised, which then drop out. After the
    deadline (of time.monotonic) no new round starts, save the first.
    """
    times: dict[str, list[float]] = {name: [] for name in timers}
    failures: dict[str, str] = {}
    order = random.Random(seed)
    for index in range(rounds):
        if index and time.monotonic() > deadline:
            break
        names = [name for name in timers if name not in failures]
        order.shuffle(names)
        for name in names:
            try:
                times[name].append(timers[name]())
            # Whatever another project's kernel raises is that candidate's result.
            except Exception as error:
                failures[name] = describe_error(error)
                release(device)
    return times, failures


def summary(times: list[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile of milliseconds, and the times themselves."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {
        "median_ms": statistics.median(ordered),
        "p20_ms": ordered[round(0.2 * last)],
        "p80_ms": ordered[round(0.8 * last)],
        "times_ms": [round(value, 4) for value in times],
    }


def peak_extra_bytes(
    call: Callable[[], None], before: Callable[[], None], kept_bytes: int, device: torch.device
) -> int | None:
    """Most memory that a call held besides the inputs and the `kept_bytes` of gradients it returns.

    On a CPU by the resident set, which only Linux tells; None elsewhere.
    """
    before()
    if device.type != "cuda":
        return _peak_resident(call, kept_bytes)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held - kept_bytes


def _peak_resident(call: Callable[[], None], kept_bytes: int) -> int | None:
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():
        return None
    # Freed memory that malloc still holds would hide what the call takes from it.
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")  # the peak starts again from now on
    held = _kib(status, "VmRSS")
    call()
    return 1024 * (_kib(status, "VmHWM") - held) - kept_bytes


def _kib(status: Path, name: str) -> int:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


class ReportedError(RuntimeError):
    """What another process said of an error, or how that process ended."""


def describe_error(error: BaseException) -> str:
    """One line about an exception."""
    if isinstance(error, ReportedError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def release(device: torch.device) -> None:
    """Give cached memory back; raises if the device no longer answers."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def clocks(device: torch.device) -> dict[str, str] | None:
    """Clocks, temperature and power by nvidia-smi, or None where there is none."""
    fields = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,driver_version"
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.split(",")]
    names = fields.split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else None
