"""Starts processes as torchrun does, on one machine; each does the same work."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    ranks = []
    for rank in range(size):
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        env = os.environ | {name: str(value) for name, value in given.items()}
        env |= {"MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", *sys.path)))
        log = (folder / f"rank{rank}.log").open("w")
        command = [sys.executable, __file__, work, str(folder)]
        ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=ROOT))
    try:
        codes = [rank.wait(timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    logs = [(folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(size)]
    assert codes == [0] * size, "\n\n".join(logs)
    return [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(size)]


def _main() -> None:
    import importlib

    name, folder = sys.argv[1], Path(sys.argv[2])
    module, function = name.split(":")
    args = pickle.loads((folder / "args.pickle").read_bytes())
    value = getattr(importlib.import_module(module), function)(*args)
    (folder / f"rank{os.environ['RANK']}.pickle").write_bytes(pickle.dumps(value))


if __name__ == "__main__":
    _main()
