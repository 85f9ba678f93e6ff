"""Entry point of the `aepo-fast` command."""

from __future__ import annotations

import importlib.util
import sys

# What `pip install aepo-fast` alone leaves out.
_TRAIN_ONLY = ("typer", "transformers", "datasets", "reasoning_gym", "rich", "tomli_w")


def main() -> None:
    """Run the command line, or say what has to be installed for it."""
    missing = [name for name in _TRAIN_ONLY if importlib.util.find_spec(name) is None]
    if missing:
        reason = (
            f"aepo-fast: {', '.join(missing)} not installed; the kernels work without, the "
            "commands need them. Run: pip install 'aepo-fast[train]'"
        )
        if sys.argv[1:] == ["doctor"]:
            from aepo_kernels.doctor import report

            print(report("aepo-fast"), "", reason, sep="\n")
            return
        print(reason, file=sys.stderr)
        raise SystemExit(2)
    try:
        from aepo_fast.cli.app import run

        run()
    except KeyboardInterrupt:  # before or after the command itself
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
