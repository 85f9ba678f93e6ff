"""Benchmarks: `python -m bench kernels` and `entropy`; `tables` writes those of the README."""

from __future__ import annotations

import argparse

from bench import entropy, kernels, tables


def main() -> None:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    commands = parser.add_subparsers(required=True)
    kernels.add_command(commands)
    entropy.add_command(commands)
    tables.add_command(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
