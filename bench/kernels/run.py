"""How fast are the fused heads? Our backends, the peers that are installed and the bare GEMMs."""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from aepo_kernels import multiplies_bfloat16, row_kernels
from bench.common.environment import (
    RESULTS,
    command_line,
    describe,
    result_path,
    version_text,
    write_result,
)
from bench.common.timing import (
    Stopwatch,
    clocks,
    describe_error,
    interleave,
    release,
    summary,
)
from bench.kernels import gate
from bench.kernels.candidates import Candidates
from bench.kernels.inputs import (
    SECOND_TEMPERATURE,
    TEMPERATURE,
    ZERO_FRACTION,
    inputs_for,
    make_inputs,
)
from bench.kernels.remote import Remote, hand_over, started
from bench.kernels.table import case_table, unavailable_list
from bench.peers import PACKAGES, all_peers, own_peers
from bench.peers.peer import MODES, Inputs, LeftOut, Mode, Peer

# (H, V) of Qwen 0.5B, Gemma 2B, Qwen 1.5-3B, Llama 8B, Qwen 8B and Qwen 14B heads.
SHAPES = (
    (896, 151936),
    (1152, 262144),
    (2048, 151936),
    (4096, 128256),
    (4096, 151936),
    (5120, 152064),
)
# First those that the pages show: a run may have a time limit.
TOKENS: tuple[int, ...] = (8192, 4096, 16384, 32768)
CPU_SHAPES, CPU_TOKENS = ((576, 49152), (896, 151936)), (512,)
QUICK = {"cuda": ([(896, 151936)], [4096]), "cpu": ([(256, 8192)], [256])}


@dataclass(frozen=True)
class Setup:
    """What stays the same over the cases of a run.

    deadline: a time of time.monotonic. remotes: the process of each peer that does not run here.
    """

    peers: list[Peer]
    modes: list[Mode]
    stopwatch: Stopwatch
    dtype: torch.dtype
    rounds: int
    seed: int
    deadline: float
    remotes: dict[str, Remote] = field(default_factory=dict)


def add_command(commands: Any) -> None:
    """Add `kernels` to the benchmark's commands."""
    names = [mode.name for mode in MODES]
    parser = commands.add_parser("kernels", help=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape, few rounds")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="HxV")
    parser.add_argument("--tokens", nargs="+", type=int, help="multiples of 32")
    parser.add_argument("--modes", nargs="+", default=names, choices=names)
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="part of a name; repeatable"
    )
    parser.add_argument(
        "--skip", action="append", metavar="NAME", help="part of a name; repeatable"
    )
    parser.add_argument("--rounds", type=int, help="timed calls each (20; 3 with --quick)")
    parser.add_argument("--limit-minutes", type=float, help="start no new case after this long")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="FOLDER",
        help=f"has folders {', '.join(PACKAGES)} with the packages that each needs; one that is "
        "missing or lacks a package sees the installed ones",
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Run every case, writing the record after each, then the figure."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype)
    chosen = [peer for peer in all_peers() if _is_chosen(peer.name, arguments)]
    own = {peer.name for peer in own_peers()}
    others = [peer.name for peer in chosen if peer.name not in own]
    folder = arguments.peers and arguments.peers.resolve()
    with started(others, folder, device, dtype) as (remotes, found):
        for peer in chosen:
            if peer.name in own:
                reason = peer.unavailable_reason(device, dtype)
                found[peer.name] = {"reason": reason, "version": peer.version()}
        _run(arguments, chosen, remotes, found)


def _run(
    arguments: argparse.Namespace,
    chosen: list[Peer],
    remotes: dict[str, Remote],
    found: dict[str, dict[str, str | None]],
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype)
    shapes, tokens = _sizes(arguments, device)
    reasons = {peer.name: found[peer.name]["reason"] for peer in chosen}
    minutes = arguments.limit_minutes
    setup = Setup(
        [peer for peer in chosen if reasons[peer.name] is None],
        [mode for mode in MODES if mode.name in arguments.modes],
        Stopwatch(device),
        dtype,
        arguments.rounds or (3 if arguments.quick else 20),
        arguments.seed,
        time.monotonic() + 60 * minutes if minutes is not None else float("inf"),
        remotes,
    )
    record: dict[str, Any] = {
        "benchmark": "kernels",
        "environment": describe()
        | {
            "triton": version_text("triton"),
            "row_kernels": row_kernels("cuda" if torch.cuda.is_available() else "cpu"),
        },
        "clocks": clocks(device),
        "command": command_line(),
        "settings": _settings(setup),
        "versions": {peer.name: found[peer.name]["version"] for peer in chosen},
        "unavailable": {name: reason for name, reason in reasons.items() if reason is not None},
        "cases": [],
    }
    path = result_path(arguments.results, "kernels")
    path.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written fails before the work
    print(unavailable_list(record), flush=True)
    for num_tokens, (hidden_size, vocab) in itertools.product(tokens, shapes):
        if record["cases"] and time.monotonic() > setup.deadline:
            print("stopped: --limit-minutes is over")
            break
        case = {"tokens": num_tokens, "hidden": hidden_size, "vocab": vocab}
        record["cases"].append(case)
        # After every mode, so that a run that is killed or whose GPU dies loses one at most.
        for _ in run_case(case, setup):
            write_result(path, record)
        print(case_table(case), flush=True)
    print(f"result: {path}\nfigure: {_draw(record, path.with_suffix('.png'))}")


def run_case(case: dict[str, Any], setup: Setup) -> Iterator[None]:
    """Fill in one case, its clocks and, by mode, floor and candidates; yields after each step."""
    device = setup.stopwatch.device
    if "torch._dynamo" in sys.modules:
        # Compiled code of other shapes would count against dynamo's limit of variants.
        torch.compiler.reset()
    case["modes"] = {}
    try:
        inputs = make_inputs(
            case["tokens"], case["hidden"], case["vocab"], setup.dtype, device, setup.seed
        )
    except torch.OutOfMemoryError as error:
        case["message"] = describe_error(error)
        yield
        return
    setup.stopwatch.give_back()
    hand_over(list(dict.fromkeys(setup.remotes.values())), inputs)
    case["clocks_before"] = clocks(device)
    for mode in setup.modes:
        if case["modes"] and time.monotonic() > setup.deadline:
            break
        try:
            case["modes"][mode.name] = run_mode(inputs_for(inputs, mode), mode, setup)
        except torch.OutOfMemoryError as error:  # of the gate or the bare GEMMs
            case["modes"][mode.name] = {"title": mode.title, "message": describe_error(error)}
            gate.clear_gradients(inputs)
            release(device)
        case["clocks_after"] = clocks(device)
        yield


def run_mode(inputs: Inputs, mode: Mode, setup: Setup) -> dict[str, Any]:
    """Gate, memory and times of every candidate in one mode; the bare GEMMs are of all tokens."""
    everyone = Candidates(setup.peers, setup.remotes, inputs, mode, setup.stopwatch)
    candidates = gated(everyone, inputs, mode, setup)
    stopwatch, clear = setup.stopwatch, everyone.local.clear
    timers: dict[str, Callable[[], float]] = {}
    for peer in setup.peers:
        found = candidates[peer.name]
        if found["status"] != "ok":
            continue
        try:
            found["peak_extra_bytes"] = everyone.peak(peer.name)
        # Whatever another project's kernel raises is that candidate's result.
        except Exception as error:
            found |= {"status": "failed", "message": describe_error(error)}
            clear()
            release(stopwatch.device)
        else:
            timers[peer.name] = functools.partial(everyone.time_ms, peer.name)
    floor, gemms = bare_gemms(inputs, mode)
    timers[floor] = functools.partial(stopwatch.time_ms, gemms, clear)
    gemms()
    times, failures = interleave(
        timers,
        stopwatch.device,
        rounds=setup.rounds,
        seed=setup.seed,
        deadline=setup.deadline,
    )
    clear()
    if floor in failures:
        raise torch.OutOfMemoryError(failures[floor])
    for name, message in failures.items():
        candidates[name] |= {"status": "failed", "message": message}
    floor_times = summary(times.pop(floor))
    for name, values in times.items():
        if candidates[name]["status"] == "ok":
            candidates[name] |= summary(values)
    add_ratios(candidates, floor_times["median_ms"], [p.name for p in setup.peers if p.is_ours])
    return {"title": mode.title, "floor": {"name": floor, **floor_times}, "candidates": candidates}


def gated(
    everyone: Candidates, inputs: Inputs, mode: Mode, setup: Setup
) -> dict[str, dict[str, Any]]:
    """Each candidate's record after the gate; the truth is gone before anything is timed."""
    epsilon = torch.finfo(inputs.hidden.dtype).eps
    candidates: dict[str, dict[str, Any]] = {}
    waiting: dict[str | None, list[Peer]] = {}
    for peer in setup.peers:
        reason = peer.excluded(mode)
        candidates[peer.name] = {"status": "excluded", "message": reason or ""}
        if reason is None:
            waiting.setdefault(peer.loss_in(mode), []).append(peer)
    for loss, peers in waiting.items():
        exact = gate.truth(inputs, mode, loss)
        reference = gate.errors_of(gate.baseline(inputs, mode, loss), exact)
        for peer in peers:
            try:
                found = gate.check(everyone.values(peer.name), exact, reference, epsilon)
            except LeftOut as reason:
                found = {"status": "excluded", "message": str(reason)}
            # Whatever another project's kernel raises is that candidate's result.
            except Exception as error:
                found = {"status": "failed", "message": describe_error(error)}
                gate.clear_gradients(inputs)
                release(setup.stopwatch.device)
            candidates[peer.name] = {"lacks": peer.lacks(mode), **found}
        del exact
        release(setup.stopwatch.device)
    return candidates


def add_ratios(candidates: dict[str, dict[str, Any]], floor_ms: float, ours: list[str]) -> None:
    """Add to each timed candidate its time over the floor's and over each of ours."""
    timed = {name: found for name, found in candidates.items() if "median_ms" in found}
    for found in timed.values():
        found["ratio_to_floor"] = found["median_ms"] / floor_ms
        found["ratio_to_ours"] = {
            name: found["median_ms"] / timed[name]["median_ms"] for name in ours if name in timed
        }


def bare_gemms(inputs: Inputs, mode: Mode) -> tuple[str, Callable[[], None]]:
    """The GEMMs of a mode alone, and their name: in float32 where the device has no narrow ones.

    On a CPU they write to memory that is there already: fresh memory costs as much as a GEMM.
    """
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    kind = ""
    if hidden.dtype == torch.bfloat16 and not multiplies_bfloat16(hidden.device.type):
        hidden, weight, kind = hidden.float(), weight.float(), "float32 "
    count = 1 + mode.training + (mode.training and not mode.frozen)
    outputs: list[torch.Tensor | None] = [None] * 3
    if hidden.device.type == "cpu":
        shapes = [(len(hidden), len(weight)), hidden.shape, weight.shape]
        outputs = [hidden.new_empty(shape) for shape in shapes[:count]]

    def call() -> None:
        logits = torch.mm(hidden, weight.T, out=outputs[0])
        if count > 1:
            torch.mm(logits, weight, out=outputs[1])
        if count > 2:
            torch.mm(logits.T, hidden, out=outputs[2])

    return f"{count} {kind}GEMM{'s' * (count > 1)}", call


def _settings(setup: Setup) -> dict[str, Any]:
    return {
        "dtype": str(setup.dtype).removeprefix("torch."),
        "rounds": setup.rounds,
        "seed": setup.seed,
        "threads": torch.get_num_threads(),
        "temperature": TEMPERATURE,
        "second_temperature": SECOND_TEMPERATURE,
        "zero_advantage_fraction": ZERO_FRACTION,
        "flush_bytes": setup.stopwatch.flush_bytes,
        "gate_limit": gate.LIMIT,
        "gate_epsilons": gate.EPSILONS,
    }


def _sizes(
    arguments: argparse.Namespace, device: torch.device
) -> tuple[list[tuple[int, int]], list[int]]:
    shapes, tokens = list(SHAPES), list(TOKENS)
    if device.type != "cuda":
        shapes, tokens = list(CPU_SHAPES), list(CPU_TOKENS)
    if arguments.quick:
        shapes, tokens = QUICK[device.type]
    return arguments.shapes or shapes, arguments.tokens or tokens


def _shape(text: str) -> tuple[int, int]:
    hidden_size, vocab = text.lower().split("x")
    return int(hidden_size), int(vocab)


def _is_chosen(name: str, arguments: argparse.Namespace) -> bool:
    def named(parts: list[str] | None) -> bool:
        return any(part.lower() in name.lower() for part in parts or [])

    return (arguments.only is None or named(arguments.only)) and not named(arguments.skip)


def _draw(record: dict[str, Any], path: Path) -> str:
    try:
        from bench.kernels.figure import draw
    except ImportError as error:
        return f"not drawn ({error}); `python -m bench tables` draws it where that is installed"
    return str(draw(record, path))
