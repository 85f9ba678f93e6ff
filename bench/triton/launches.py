"""Which launch of each Triton kernel is the fastest on this GPU? For the tables of `launch`."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from aepo_kernels.gpu import launch
from aepo_kernels.gpu.launch import FusedLaunch, RowLaunch
from aepo_kernels.rows.interface import LogitMap, RowCoefs
from bench.common.environment import (
    RESULTS,
    command_line,
    describe,
    result_path,
    version_text,
    write_result,
)
from bench.common.timing import clocks, describe_error

# What a thread may hold of a row: fewer numbers are fewer bytes on their way to it.
_LEAST, _MOST = 8, 32
_PLAIN = LogitMap(None, None, 1.0)

Timer = Callable[[Callable[[], object]], float]
Calls = dict[str, Callable[[], object]]


def add_command(commands: Any) -> None:
    """Add `launches` to the benchmark's commands."""
    parser = commands.add_parser("launches", help=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, nargs="+", default=[896, 4096])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Time every launch of every kernel and print the five fastest of each."""
    if not torch.cuda.is_available():
        raise SystemExit("launches are timed on a GPU, and torch sees none: see bench compiled")
    from triton.testing import do_bench

    device = torch.device("cuda")

    def timer(call: Callable[[], object]) -> float:
        median: Any = do_bench(call, warmup=15, rep=40, return_mode="median")
        return median

    reads, grads = row_calls(arguments, device)
    found = {
        "row_stats": sweep("STATS_LAUNCH", stats_launches(), reads, timer),
        "row_grad": sweep("GRAD_LAUNCH", grad_launches(), grads, timer),
    }
    del reads, grads
    for hidden_size in arguments.hidden:
        calls = fused_calls(arguments, hidden_size, device)
        rows = sweep("FUSED_LAUNCH", fused_launches(device), calls, timer)
        found[f"fused, H {hidden_size}"] = rows
    for name, rows in found.items():
        report(name, rows)
    record = {
        "benchmark": "launches",
        "environment": describe() | {"triton": version_text("triton")},
        "clocks": clocks(device),
        "command": command_line(),
        "kernels": found,
    }
    path = result_path(arguments.results, "launches")
    write_result(path, record)
    print(f"result: {path}")


def stats_launches() -> list[RowLaunch]:
    """Launches of the row statistics."""
    sizes = itertools.product([512, 1024, 2048, 4096, 8192], [1, 2, 4, 8, 16], [1, 2, 3, 4])
    return [RowLaunch(*size) for size in sizes if _LEAST <= size[0] // (32 * size[1]) <= _MOST]


def grad_launches() -> list[RowLaunch]:
    """Launches of the row gradients."""
    sizes = itertools.product([1024, 2048, 4096, 8192], [2, 4, 8, 16])
    return [RowLaunch(*size) for size in sizes if _LEAST <= size[0] // (32 * size[1]) <= _MOST]


def fused_launches(device: torch.device) -> list[FusedLaunch]:
    """Launches of the fused forward, by the copy engine where the device's own has it."""
    tma = launch.fused_launch(device, torch.bfloat16, True, False).tma
    tiles = [(128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8)]
    return [
        FusedLaunch(tokens, vocab, 64, warps, stages, group, tma, split)
        for (tokens, vocab, warps), stages, group, split in itertools.product(
            tiles, [3, 4], [8, 16], [False, True]
        )
    ]


def row_calls(arguments: Any, device: torch.device) -> tuple[Calls, Calls]:
    """Calls of the two row kernels on random logits."""
    from aepo_kernels.gpu import rows as triton_rows

    size = arguments.tokens, arguments.vocab
    logits = (3 * torch.randn(size, device=device)).bfloat16()
    targets = torch.randint(arguments.vocab, size[:1], device=device)
    inputs = logits, targets, 1.0
    stats = triton_rows.row_stats(*inputs, 0.8, _PLAIN, torch.float32)
    out, coef = torch.empty_like(logits), torch.randn(size[0], device=device)

    def grad(*coefs: Any) -> Callable[[], object]:
        options = {"out": out, "bias_grad": None}
        return lambda: triton_rows.row_grad(
            *inputs, 0.8, _PLAIN, stats, RowCoefs(*coefs), **options
        )

    reads: Calls = {
        "ms": lambda: triton_rows.row_stats(*inputs, None, _PLAIN, torch.float32),
        "second_ms": lambda: triton_rows.row_stats(*inputs, 0.8, _PLAIN, torch.float32),
    }
    grads: Calls = {
        "ms": grad(coef, None, None, None),
        "entropy_ms": grad(coef, coef, None, None),
        "second_ms": grad(coef, coef, None, coef),
    }
    return reads, grads


def fused_calls(arguments: Any, hidden_size: int, device: torch.device) -> Calls:
    """Calls of the fused forward on random inputs."""
    from aepo_kernels.gpu import fused as triton_fused

    hidden = torch.randn(arguments.tokens, hidden_size, device=device).bfloat16()
    weight = torch.randn(arguments.vocab, hidden_size, device=device).bfloat16() / hidden_size**0.5
    targets = torch.randint(arguments.vocab, (arguments.tokens,), device=device)
    return {
        name: lambda second=second: triton_fused.linear_row_stats(
            hidden, weight, targets, 1.0, second, _PLAIN
        )
        for name, second in (("ms", None), ("second_ms", 0.8))
    }


def sweep(table: str, candidates: list[Any], calls: Calls, timer: Timer) -> list[dict[str, Any]]:
    """Times of each candidate, fastest first; what does not compile comes last, with a message."""
    rows: list[dict[str, Any]] = []
    for candidate in candidates:
        row: dict[str, Any] = {"launch": candidate._asdict()}
        with _only(table, candidate):
            try:
                row |= {name: timer(call) for name, call in calls.items()}
            # Whatever the compiler raises is that candidate's result.
            except Exception as error:
                row["message"] = describe_error(error)
        rows.append(row)
    return sorted(rows, key=lambda row: row.get("ms", float("inf")))


@contextmanager
def _only(table: str, entry: Any) -> Iterator[None]:
    """One launch for every chip."""
    before = getattr(launch, table)
    setattr(launch, table, {0: entry})
    try:
        yield
    finally:
        setattr(launch, table, before)


def report(name: str, rows: list[dict[str, Any]]) -> None:
    """Print the five fastest and how many failed."""
    failed = sum("message" in row for row in rows)
    print(f"{name}: {len(rows)} launches, {failed} of them failed")
    for row in [row for row in rows if "ms" in row][:5]:
        times = ", ".join(f"{key} {row[key]:.3f}" for key in row if key.endswith("ms"))
        print(f"  {times}: {tuple(row['launch'].values())}", flush=True)
