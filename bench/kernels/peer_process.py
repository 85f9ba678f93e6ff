"""The process of one package's candidates: does what the process that compares asks of it.

`python -m bench.kernels.peer_process PACKAGE`: a request is a line of JSON on stdin, and so is its
answer on stdout.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from bench.common.timing import Stopwatch, describe_error, release
from bench.kernels import gate
from bench.kernels.inputs import inputs_for, load_inputs
from bench.kernels.local import Local
from bench.peers import peers_of
from bench.peers.peer import MODES, Inputs, LeftOut

_MODES = {mode.name: mode for mode in MODES}


class PeerProcess:
    """The candidates of a package, and the problem that they were given last."""

    def __init__(self, package: str) -> None:
        self.peers = peers_of(package)
        self.inputs: Inputs | None = None
        self.stopwatch = Stopwatch(torch.device("cpu"))

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request: its value, why it was left out, or what failed."""
        try:
            return {"value": getattr(self, f"do_{request.pop('do')}")(**request)}
        except LeftOut as reason:
            return {"left_out": str(reason)}
        # Whatever another project's kernel raises is that candidate's result.
        except Exception as error:
            message = describe_error(error)
        if self.inputs is not None:
            gate.clear_gradients(self.inputs)
        release(self.stopwatch.device)  # ends this process where the device no longer answers
        return {"error": message}

    def do_begin(self, device: str, dtype: str, threads: int, theirs: str) -> dict[str, Any]:
        """Each candidate's version, and why it cannot run here (None where it can).

        theirs: the torch of the process that compares. A version names another one.
        """
        torch.set_num_threads(threads)
        self.stopwatch = Stopwatch(torch.device(device))
        where = self.stopwatch.device, getattr(torch, dtype)
        # First what it takes to import, which also finds versions.
        reasons = {peer.name: peer.unavailable_reason(*where) for peer in self.peers}
        found = {peer.name: peer.version() for peer in self.peers}
        if torch.__version__ != theirs:
            found = {
                name: version and f"{version}, torch {torch.__version__}"
                for name, version in found.items()
            }
        return {name: {"reason": reasons[name], "version": found[name]} for name in found}

    def do_load(self, path: str) -> None:
        """Take a new problem."""
        self.inputs = None
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        self.inputs = load_inputs(path, self.stopwatch.device)

    def do_values(self, peer: str, mode: str, path: str) -> None:
        """Save a candidate's gate values to a file."""
        torch.save(self._local(mode).values(peer), path)
        self.stopwatch.give_back()

    def do_peak(self, peer: str, mode: str) -> int | None:
        """A candidate's peak memory."""
        local = self._local(mode)
        found = local.peak(peer)
        local.clear()
        self.stopwatch.give_back()
        return found

    def do_time(self, peer: str, mode: str) -> float:
        """Milliseconds of one call."""
        local = self._local(mode)
        found = local.time_ms(peer)
        local.clear()
        self.stopwatch.give_back_if_scarce()
        return found

    def _local(self, mode: str) -> Local:
        assert self.inputs is not None, "no problem was loaded"
        found = _MODES[mode]
        return Local(self.peers, inputs_for(self.inputs, found), found, self.stopwatch)


def main(package: str) -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a package prints is no answer
    process = PeerProcess(package)
    for line in sys.stdin:
        answers.write(json.dumps(process.answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
