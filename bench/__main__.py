"""Benchmarks: `python -m bench kernels`, `compiled`, `entropy`; `tables` writes the README's."""

from __future__ import annotations

import argparse

from bench import compiled, entropy, kernels, tables


def main() -> None:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    commands = parser.add_subparsers(required=True)
    for command in (kernels, compiled, entropy, tables):
        command.add_command(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
