"""How long does it take to hand each rollout engine new weights, and what is copied for it?"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.sampling.engines import add_arguments, load_engine, load_trained, spread, write


def add_command(commands: Any) -> None:
    """Add `sync` to the benchmark's commands."""
    parser = commands.add_parser("sync", help=__doc__)
    add_arguments(parser)
    parser.add_argument(
        "--lora", type=int, default=0, help="rank of an adapter on all layers, all that is handed"
    )
    parser.set_defaults(run=time_syncs)


def time_syncs(arguments: argparse.Namespace) -> None:
    """Seconds, bytes copied and extra memory of a sync: medians over rounds, ways in turn.

    Beside vLLM's transfer stands `load_weights` for each parameter by itself, as other trainers do.
    """
    folder, model = load_trained(arguments)
    before = _allocated()
    engines = {name: load_engine(name, folder, model, arguments) for name in arguments.engines}
    ways: dict[str, Callable[[], int]] = {}
    if "hf" in engines:
        ways["hf"] = lambda: _sync_hf(engines["hf"], model)
    unavailable: dict[str, str] = {}
    found: dict[str, Any] = {}
    if "vllm" in engines:
        # First: once weights are shared, loading them copies them onto themselves. An adapter has
        # no parameters of vLLM's model.
        one = {"vllm load_weights": lambda: _load_each(engines["vllm"], model)}
        loads = {} if arguments.lora else _times(one, arguments)
        unavailable = {name: one for name, one in loads.items() if isinstance(one, str)}
        found = {name: one for name, one in loads.items() if not isinstance(one, str)}
        ways["vllm"] = lambda: _sync_vllm(engines["vllm"], model)
    found |= _times(ways, arguments)
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    for name, one in found.items():
        ms = {key: 1e3 * value for key, value in one["seconds"].items()}
        memory = one["extra_memory_bytes"]
        print(
            f"{name:18} {ms['median']:8.1f} ms ({ms['p20']:.1f} to {ms['p80']:.1f})  "
            f"{one['bytes_copied'] / 2**20:8.1f} MiB copied"
            + ("" if memory is None else f"  {memory / 2**20:8.1f} MiB more at its peak")
        )
    for name, reason in unavailable.items():
        print(f"{name:18} not available: {reason}")
    memory = {"before_engines": before, "with_engines": _allocated()}
    write(
        "lora-sync" if arguments.lora else "sync",
        arguments,
        {
            "trainer_bytes": model_bytes,
            "ways": found,
            "not_available": unavailable,
            "gpu_memory_bytes": memory if torch.cuda.is_available() else None,
        },
    )


def _times(ways: dict[str, Callable[[], int]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of each way, or why there are none."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    figures: dict[str, Any] = {}
    for number in range(arguments.rounds + 1):
        for name, sync in ways.items():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            held, start = _allocated(), time.perf_counter()
            try:
                copied = sync()
            except NotImplementedError as error:
                figures[name] = str(error)
                continue
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            took = time.perf_counter() - start
            peak = torch.cuda.max_memory_allocated() - held if torch.cuda.is_available() else None
            if number:  # the first one finds out where everything is
                seconds[name].append(took)
                figures[name] = {"bytes_copied": copied, "extra_memory_bytes": peak}
    for name, values in seconds.items():
        if values:
            figures[name]["seconds"] = spread(values)
    return figures


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _sync_hf(engine: Any, model: torch.nn.Module) -> int:
    engine.sync_weights(model, 0)
    return 0 if engine.shared else sum(2 * p.numel() for p in model.parameters())


def _sync_vllm(engine: Any, model: torch.nn.Module) -> int:
    engine.sync_weights(model, 0)
    return int(engine.metrics["sync/bytes_copied"])


@torch.no_grad()
def _load_each(engine: Any, model: torch.nn.Module) -> int:
    def load(inner: Any) -> int:
        if any(parameter.numel() == 0 for parameter in inner.parameters()):
            raise NotImplementedError(
                "this CPU build has packed its weights, which cannot be loaded"
            )
        for name, parameter in model.named_parameters():
            inner.load_weights([(name, parameter.detach())])
        return sum(p.numel() * p.element_size() for p in inner.parameters())

    (copied,) = engine.llm.apply_model(load)
    engine.llm.reset_prefix_cache()
    return copied
