"""Starts processes as torchrun does, on one machine; each does the same work."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from bench.common.environment import ROOT


def run_ranks(work: str, size: int, folder: Path, *args: Any, timeout_s: float = 240) -> list[Any]:
    """What `module:function` returns on each of `size` ranks, given the arguments.

    Raises AssertionError with what it printed where a rank fails; none outlives the call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "args.pickle").write_bytes(pickle.dumps(args))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    env |= {"WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", *sys.path)))
    command = [sys.executable, __file__, work, str(folder)]
    with (folder / "ranks.log").open("w") as log:
        ranks = subprocess.Popen(
            command, env=env, stdout=log, stderr=log, cwd=ROOT, start_new_session=True
        )
        try:
            code = ranks.wait(timeout_s)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(ranks.pid, signal.SIGKILL)
            ranks.wait()
    logs = [path.read_text()[-3000:] for path in sorted(folder.glob("rank*.log"))]
    assert code == 0, "\n\n".join(logs)
    return [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(size)]


def _main() -> None:
    """Import the work once, and do it in a fork for each rank: imports take longest."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    module, function = name.split(":")
    work = getattr(importlib.import_module(module), function)
    forks = []
    for rank in range(int(os.environ["WORLD_SIZE"])):
        fork = os.fork()
        if not fork:
            _do(work, rank, folder)
        forks.append(fork)
    ends = [os.waitpid(fork, 0)[1] for fork in forks]
    sys.exit(any(ends))


def _do(work: Callable[..., Any], rank: int, folder: Path) -> NoReturn:
    """Do the work as a rank, and end this process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        value = work(*pickle.loads((folder / "args.pickle").read_bytes()))
        (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(value))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main()
