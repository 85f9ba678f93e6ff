"""`aepo-fast bench`: the benchmarks of the source repository."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_bench(arguments: Sequence[str]) -> int:
    """Run `python -m bench` with some arguments; its exit code, or 2 where there is no bench."""
    if not (ROOT / "bench" / "__main__.py").exists():
        print(
            "error: the benchmarks are not part of the installed package; clone the source "
            "repository and run `python -m bench` in it",
            file=sys.stderr,
        )
        return 2
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    # -P: another folder named bench where the user stands must not win.
    return subprocess.run(
        [sys.executable, "-P", "-m", "bench", *arguments], env=environment
    ).returncode
