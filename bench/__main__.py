"""Benchmarks by name: `python -m bench kernels`; `tables` writes those of the README and docs."""

from __future__ import annotations

import argparse

from bench import entropy, tables
from bench.e2e import run as e2e
from bench.kernels import run as kernels
from bench.memory import run as memory
from bench.sampling import rollout, sync
from bench.scale import run as scale
from bench.step import run as step
from bench.triton import compiled, launches


def main() -> None:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    commands = parser.add_subparsers(required=True)
    all_of_them = (kernels, compiled, launches, rollout, step, memory, scale, e2e, sync, entropy)
    for command in (*all_of_them, tables):
        command.add_command(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
