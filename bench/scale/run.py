"""How fast is a step over several processes, what holds it up, and what do 64 nodes promise?"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.common.environment import (
    RESULTS,
    child_environment,
    command_line,
    describe,
    result_path,
    write_result,
)


def add_command(commands: Any) -> None:
    """Add `scale` to the benchmark's commands."""
    parser = commands.add_parser("scale", help=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2], help="processes (1 2)")
    parser.add_argument("--model", default="package:smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=4, help="of each rank and step (4)")
    parser.add_argument("--samples", type=int, default=8, help="of each prompt (8)")
    parser.add_argument("--tokens", type=int, default=32, help="most of a sample (32)")
    parser.add_argument("--tokens-per-microbatch", type=int, default=2048)
    parser.add_argument(
        "--batch-tokens",
        type=int,
        help="tokens that a micro-batch costs besides its own (those of the trainer)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps (5)")
    parser.add_argument("--nodes", type=int, default=64, help="the simulation's last point (64)")
    parser.add_argument(
        "--step",
        type=Path,
        metavar="RESULT",
        help="simulate from a step of `bench step` that was measured before, not from ours",
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.set_defaults(run=scale)


def scale(arguments: argparse.Namespace) -> None:
    """Measure steps over each number of ranks, and simulate many devices from one."""
    # The other benchmarks run without the trainer's packages.
    from bench.scale.figure import draw
    from bench.scale.simulate import Network, expected

    if arguments.step is None and 1 not in arguments.ranks:
        raise SystemExit(f"--ranks {arguments.ranks}: the simulation needs the step of 1 rank")
    found = [measured(arguments, ranks) for ranks in sorted(set(arguments.ranks))]
    if found:
        print(table(found))
    network = Network()
    step = step_of_result(arguments.step) if arguments.step else step_of(found[0], arguments)
    last = arguments.nodes * network.devices_per_node
    counts = [2**power for power in range(last.bit_length()) if 2**power <= last]
    steps = [expected(step, network, devices) for devices in counts]
    print(simulation_table(steps))
    path = result_path(arguments.results, "scale")
    settings = {name: value for name, value in vars(arguments).items() if name != "run"}
    record = {
        "benchmark": "scale",
        "environment": describe(),
        "command": command_line(),
        "settings": settings | {"results": None, "step": str(arguments.step or "")},
        "measured": found,
        "simulation": {
            "assumed": dataclasses.asdict(network),
            "step": dataclasses.asdict(step),
            "expected": [dataclasses.asdict(one) | {"seconds": one.seconds} for one in steps],
        },
    }
    write_result(path, record)
    ratios = {one["ranks"]: one["ratio"] for one in ratios_to_one(found)}
    picture = draw(steps, ratios, assumptions(network), path.with_suffix(".png"))
    print(f"result: {path}\npicture: {picture}")


def measured(arguments: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """What rank 0 of so many processes found; each has as much to do as one alone."""
    names = "model prompts samples tokens tokens_per_microbatch batch_tokens rounds".split()
    with tempfile.TemporaryDirectory() as folder:
        settings, result = Path(folder) / "settings.json", Path(folder) / "result.json"
        settings.write_text(json.dumps({name: getattr(arguments, name) for name in names}))
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        start = start if ranks > 1 else []
        where = child_environment()
        # As many threads a process, however many there are: else one would have all cores.
        where["env"] = {"OMP_NUM_THREADS": "1", **where["env"]}
        command = [sys.executable, *start, "-m", "bench.scale.worker", str(settings), str(result)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, **where)
        if done.returncode:
            raise SystemExit(f"{ranks} ranks: a process ended with {done.returncode}, see above")
        return json.loads(result.read_text()) | {"threads": where["env"]["OMP_NUM_THREADS"]}


def median(one: dict[str, Any], phase: str) -> float:
    """Seconds of a phase in the measured steps."""
    return statistics.median(step.get(f"time/{phase}", 0.0) for step in one["steps"])


def ratios_to_one(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens/s a device, and over those of one rank."""
    rates = [
        {"ranks": x["ranks"], "rate": x["completion_tokens"] / x["ranks"] / median(x, "step")}
        for x in found
    ]
    return [{**one, "ratio": one["rate"] / rates[0]["rate"]} for one in rates]


def table(found: list[dict[str, Any]]) -> str:
    """A row per number of ranks, as Markdown."""
    rows = [
        "| ranks | tokens/s a device | over 1 rank | in collectives | idle micro-batches | sync |",
        "|---|---|---|---|---|---|",
    ]
    for one, rate in zip(found, ratios_to_one(found), strict=True):
        sync = one["weight_bytes"]["rollout"] / median(one, "sync") / 1e9
        rows.append(
            f"| {one['ranks']} | {rate['rate']:.1f} | {rate['ratio']:.2f} "
            f"| {one['collective_share']:.1%} | {one['idle_share']:.1%} | {sync:.2f} GB/s |"
        )
    return "\n".join(rows)


def simulation_table(steps: list[Any]) -> str:
    """A row per number of devices, as Markdown."""
    names = [field.name for field in dataclasses.fields(steps[0])][1:]
    rows = [
        f"| devices | expected over 1 | {' | '.join(f'{name}, s' for name in names)} |",
        "|" + "---|" * (len(names) + 2),
    ]
    for step in steps:
        cells = [f"{steps[0].seconds / step.seconds:.2f}"]
        cells += [f"{getattr(step, name):.3f}" for name in names]
        rows.append(f"| {step.devices} | {' | '.join(cells)} |")
    return "\n".join(rows)


def step_of(one: dict[str, Any], arguments: argparse.Namespace) -> Any:
    """The simulation's step, of one measured rank."""
    from bench.scale.simulate import Step

    return Step(
        prompts=arguments.prompts,
        rollout_s=median(one, "rollout") + median(one, "reward"),
        train_s=median(one, "train") + median(one, "score"),
        sync_s=median(one, "sync"),
        microbatches=max(1, round(one["microbatches"])),
        layers=one["layers"],
        parameters=one["parameters"],
        compute_bytes=one["weight_bytes"]["compute"],
        rollout_bytes=one["weight_bytes"]["rollout"],
        completion_tokens=one["completion_tokens"],
    )


def step_of_result(path: Path) -> Any:
    """The simulation's step, of a result of `bench step`; without sampling and sync."""
    from bench.sampling.engines import SHAPES, parameters_of
    from bench.scale.simulate import Step

    record = json.loads(path.read_text())
    settings, ours = record["settings"], record["candidates"]["ours"]
    name = settings["model"].removeprefix("random:")
    if name not in SHAPES:
        raise SystemExit(f"--step {path}: its model {name} is none of {', '.join(SHAPES)}")
    parameters = parameters_of(SHAPES[name])
    return Step(
        prompts=settings["prompts"],
        rollout_s=0.0,
        train_s=ours["median_ms"] / 1e3,
        sync_s=0.0,
        microbatches=-(-ours["model_tokens"] // settings["tokens_per_microbatch"]),
        layers=SHAPES[name][2],
        parameters=parameters,
        compute_bytes=2 * parameters,
        rollout_bytes=2 * parameters,
        completion_tokens=record["completion_tokens"],
    )


def assumptions(network: Any) -> str:
    """The simulation's assumptions in words."""
    return (
        f"Assumed: {network.devices_per_node} devices a node; a collective reaches "
        f"{network.node_gb_s:g} GB/s in a node and {network.network_gb_s:g} GB/s between nodes, "
        f"and takes {network.latency_us:g} us at least,\nas much again for each doubling; "
        f"lengths are lognormal (sigma {network.length_sigma:g}), at most {network.cap:g} means; "
        "each device has the work of one; a layer's collectives run beside its neighbour's work."
    )
