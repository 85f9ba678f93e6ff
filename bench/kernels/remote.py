"""Candidates in processes of their own: an import error or a crash of one loses no other."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.common.environment import child_environment
from bench.common.timing import ReportedError
from bench.kernels import gate
from bench.kernels.inputs import save_inputs
from bench.peers import PACKAGES, peers_of
from bench.peers.peer import Inputs, LeftOut, Mode

# Compiling a kernel, or a call of minutes on a CPU, takes less.
ANSWER_S = 1800.0


class Remote:
    """A process with the candidates of one package, which sees the package's folder first."""

    def __init__(self, package: str, folder: Path | None, device: torch.device) -> None:
        self.package, self.folder, self.device = package, folder, device
        self.unready = ""  # why there is no problem to compute
        self.exchange = tempfile.TemporaryDirectory(prefix=f"bench-{package}-")
        self._begin()

    def _begin(self) -> None:
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.kernels.peer_process", self.package],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            **child_environment(self.folder),
        )

    def begin(self, dtype: torch.dtype) -> dict[str, dict[str, str | None]]:
        """By candidate its "version" and the "reason" why it cannot run here, or None."""
        known = {
            "device": str(self.device),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "theirs": str(torch.__version__),
        }
        try:
            return self._ask("begin", **known)
        except ReportedError as error:
            none = {"reason": str(error), "version": None}
            return {peer.name: none for peer in peers_of(self.package)}

    def load(self, path: Path, dtype: torch.dtype) -> None:
        """Hand a problem over; where that fails, its values are what fails."""
        if self.process.poll() is not None:  # it crashed in the case before
            self.log.close()
            self._begin()
            self.begin(dtype)
        try:
            self._ask("load", path=str(path))
            self.unready = ""
        except ReportedError as error:
            self.unready = str(error)

    def values(self, name: str, mode: Mode) -> gate.Values:
        """As `Local.values`; raises ReportedError or LeftOut."""
        if self.unready:
            raise ReportedError(self.unready)
        path = Path(self.exchange.name) / "values.pt"
        self._ask("values", peer=name, mode=mode.name, path=str(path))
        try:
            return torch.load(path, map_location=self.device)
        finally:
            path.unlink()

    def peak(self, name: str, mode: Mode) -> int | None:
        """As `Local.peak`; raises ReportedError."""
        return self._ask("peak", peer=name, mode=mode.name)

    def time_ms(self, name: str, mode: Mode) -> float:
        """As `Local.time_ms`; raises ReportedError."""
        return self._ask("time", peer=name, mode=mode.name)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.log.close()
        self.exchange.cleanup()

    def _ask(self, what: str, **known: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": what, **known}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise ReportedError(self._how_it_ended()) from None
        if not select.select([self.process.stdout], [], [], ANSWER_S)[0]:
            self.process.kill()
            raise ReportedError(f"its process gave no answer for {ANSWER_S:.0f} seconds")
        line = self.process.stdout.readline()
        if not line:
            raise ReportedError(self._how_it_ended())
        answer = json.loads(line)
        if "left_out" in answer:
            raise LeftOut(answer["left_out"])
        if "error" in answer:
            raise ReportedError(answer["error"])
        return answer["value"]

    def _how_it_ended(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        said = f": {lines[-1]}" if lines else ""
        return f"its process ended with exit code {code}{said}"[:300]


@contextmanager
def started(
    names: Iterable[str], folder: Path | None, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[dict[str, Remote], dict[str, dict[str, str | None]]]]:
    """A process for each package of the candidates `names`, until the context is left.

    Gives the process of each candidate that can run, and of every one what `begin` says.
    folder: has a folder of packages for each name of PACKAGES; None where all are installed.
    """
    wanted = set(names)
    packages = [
        package for package in PACKAGES if wanted & {peer.name for peer in peers_of(package)}
    ]
    running = [
        Remote(package, None if folder is None else folder / package, device)
        for package in packages
    ]
    try:
        remotes, found = {}, {}
        for remote in running:
            said = {name: one for name, one in remote.begin(dtype).items() if name in wanted}
            found |= said
            able = [name for name, one in said.items() if one["reason"] is None]
            remotes |= dict.fromkeys(able, remote)
        for remote in running:
            if remote not in remotes.values():
                remote.close()
        yield remotes, found
    finally:
        for remote in running:
            remote.close()


def hand_over(remotes: Sequence[Remote], inputs: Inputs) -> None:
    """Give every process the same problem, by way of one file."""
    if not remotes:
        return
    with tempfile.TemporaryDirectory(prefix="bench-inputs-") as folder:
        path = Path(folder) / "inputs.pt"
        save_inputs(inputs, path)
        for remote in remotes:
            remote.load(path, inputs.hidden.dtype)
