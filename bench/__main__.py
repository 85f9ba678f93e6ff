"""Benchmarks: `python -m bench entropy`, `compiled`; `tables` writes the README's tables."""

from __future__ import annotations

import argparse

from bench import compiled, entropy, tables


def main() -> None:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    commands = parser.add_subparsers(required=True)
    compiled.add_command(commands)
    entropy.add_command(commands)
    tables.add_command(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
