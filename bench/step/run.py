"""How long is a whole training step: model, head and loss, backward pass, AdamW?"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.common.environment import RESULTS, installed_version
from bench.common.timing import (
    Stopwatch,
    clocks,
    describe_error,
    interleave,
    peak_extra_bytes,
    release,
    summary,
)
from bench.sampling.engines import SHAPES, model_folder, write

OURS = "ours"
FULL = {"prompts": 12, "samples": 8, "tokens": 24, "rounds": 10}
QUICK = {"prompts": 3, "samples": 4, "tokens": 12, "rounds": 2}


def add_command(commands: Any) -> None:
    """Add `step` to the benchmark's commands."""
    parser = commands.add_parser("step", help=__doc__)
    parser.add_argument(
        "--model",
        default="package:smollm2-135m-instruct",
        help=f"a model, or random:NAME for random weights of {', '.join(SHAPES)}",
    )
    parser.add_argument("--quick", action="store_true", help="few rows, few rounds")
    parser.add_argument("--prompts", type=int, help="a third of them without an advantage (12)")
    parser.add_argument("--samples", type=int, help="of each prompt (8)")
    parser.add_argument("--prompt-tokens", type=int, default=40)
    parser.add_argument("--tokens", type=int, help="most of a sample, of 4 at least (24)")
    parser.add_argument("--tokens-per-microbatch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, help="timed steps each (10)")
    parser.add_argument(
        "--lora",
        type=int,
        default=0,
        metavar="RANK",
        help="our step with an adapter on bfloat16 weights, too",
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="NAME", help="part of a name; repeatable"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.set_defaults(run=time_steps)


def time_steps(arguments: argparse.Namespace) -> None:
    """Gate, memory and times of every candidate over the same rows from the same weights."""
    # The other benchmarks run without the trainer's packages.
    from bench.step import gate
    from bench.step.candidates import FEWEST_TOKENS, all_candidates, load_problem, lora_candidate

    for name, value in (QUICK if arguments.quick else FULL).items():
        if vars(arguments)[name] is None:
            setattr(arguments, name, value)
    if arguments.tokens < FEWEST_TOKENS:
        raise SystemExit(f"--tokens {arguments.tokens}: must be {FEWEST_TOKENS} at least")
    load = functools.partial(
        load_problem,
        model_folder(arguments.model),
        prompts=arguments.prompts,
        samples=arguments.samples,
        prompt_tokens=arguments.prompt_tokens,
        tokens=arguments.tokens,
        tokens_per_microbatch=arguments.tokens_per_microbatch,
        seed=arguments.seed,
    )
    problem = load()
    candidates = [
        one
        for one in all_candidates(problem)
        if not any(part.lower() in one.name.lower() for part in arguments.skip)
    ]
    optimizers = {one.name: problem.optimizer for one in candidates}
    reference, found = gate.gated(problem, candidates)
    errors = {"errors": reference}
    if arguments.lora:
        adapted = load(dtype="bfloat16", lora_rank=arguments.lora)
        one = lora_candidate(adapted, arguments.lora)
        exact = load(lora_rank=arguments.lora)
        errors["lora_errors"], found[one.name] = gate.gated_adapter(exact, adapted, one)
        del exact
        candidates.append(one)
        optimizers[one.name] = adapted.optimizer
    time_candidates(
        {one.name: one.step for one in candidates if found[one.name]["status"] == "ok"},
        found,
        functools.partial(problem.optimizer.zero_grad, set_to_none=True),
        num_tokens=problem.num_tokens,
        device=problem.ours.device,
        rounds=arguments.rounds,
        seed=arguments.seed,
    )
    for name, optimizer in optimizers.items():
        found[name]["optimizer_bytes"] = state_bytes(optimizer)
    print(table(found))
    write(
        "step",
        arguments,
        {
            "clocks": clocks(problem.ours.device),
            "threads": torch.get_num_threads(),
            "row_kernels": problem.ours.row_kernels,
            "trl": installed_version("trl"),
            "learning_rate": problem.cfg.trainer.lr,
            "completion_tokens": problem.num_tokens,
            "gate": {"limit": gate.LIMIT, "epsilon": gate.EPSILON, **errors},
            "candidates": found,
        },
    )


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state."""
    values = (one for state in optimizer.state.values() for one in state.values())
    return sum(one.numel() * one.element_size() for one in values if torch.is_tensor(one))


def time_candidates(
    steps: dict[str, Callable[[], object]],
    found: dict[str, dict[str, Any]],
    before: Callable[[], None],
    *,
    num_tokens: int,
    device: torch.device,
    rounds: int,
    seed: int,
) -> None:
    """Add memory, times and ratios to the records `found`; num_tokens: of the completions."""
    calls: dict[str, Callable[[], None]] = {}
    for name, step in steps.items():
        call = functools.partial(_call, step)
        try:
            call()  # warm-up beyond the gate's step, which may have compiled
            found[name]["peak_extra_bytes"] = peak_extra_bytes(call, before, 0, device)
        # Whatever another project's kernel raises is that candidate's result.
        except Exception as error:
            found[name] |= {"status": "failed", "message": describe_error(error)}
            before()
            release(device)
            continue
        calls[name] = call
    stopwatch = Stopwatch(device)
    timers = {
        name: functools.partial(stopwatch.time_ms, call, before) for name, call in calls.items()
    }
    times, failures = interleave(timers, device, rounds=rounds, seed=seed, deadline=float("inf"))
    before()
    for name, values in times.items():
        if name in failures:
            found[name] |= {"status": "failed", "message": failures[name]}
            continue
        found[name] |= summary(values)
        found[name]["tokens_per_s"] = 1000 * num_tokens / found[name]["median_ms"]
    for one in found.values():
        if "median_ms" in one and "median_ms" in found.get(OURS, {}):
            one["ratio_to_ours"] = one["median_ms"] / found[OURS]["median_ms"]


def table(found: dict[str, dict[str, Any]]) -> str:
    """A row per candidate, as Markdown."""
    heads = ["candidate", "ms (p20 to p80)", f"/ {OURS}", "completion tokens/s", "model tokens"]
    heads += ["peak extra memory", "optimizer", "says"]
    rows = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, one in found.items():
        cells = [one["status"], "-", "-", "-", "-", "-", one["message"]]
        if "median_ms" in one:
            memory, ratio = one["peak_extra_bytes"], one.get("ratio_to_ours")
            cells = [
                f"{_ms(one['median_ms'])} ({_ms(one['p20_ms'])} to {_ms(one['p80_ms'])})",
                "-" if ratio is None else f"{ratio:.2f}",
                f"{one['tokens_per_s']:.0f}",
                str(one["model_tokens"]),
                "not measured" if memory is None else _mib(memory),
                _mib(one["optimizer_bytes"]) if "optimizer_bytes" in one else "-",
                "",
            ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _call(step: Callable[[], object]) -> None:
    step()
