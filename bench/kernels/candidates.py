"""All candidates over one problem in one mode, whichever process each of them runs in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.common.timing import Stopwatch
from bench.kernels import gate
from bench.kernels.local import Local
from bench.kernels.remote import Remote
from bench.peers.peer import Inputs, Mode, Peer


class Candidates:
    """Asks the process of each candidate; the one that works has the GPU's memory for itself."""

    def __init__(
        self,
        peers: Sequence[Peer],
        remotes: Mapping[str, Remote],
        inputs: Inputs,
        mode: Mode,
        stopwatch: Stopwatch,
    ) -> None:
        own = [peer for peer in peers if peer.name not in remotes]
        self.local = Local(own, inputs, mode, stopwatch)
        self.remotes, self.mode, self.stopwatch = remotes, mode, stopwatch

    def values(self, name: str) -> gate.Values:
        """A candidate's per-token values [N] and gradients by name."""
        remote = self.remotes.get(name)
        if remote is None:
            return self.local.values(name)
        self.stopwatch.give_back()
        return remote.values(name, self.mode)

    def peak(self, name: str) -> int | None:
        """A candidate's bytes beside inputs and gradients."""
        remote = self.remotes.get(name)
        if remote is None:
            return self.local.peak(name)
        self.local.clear()
        self.stopwatch.give_back()
        return remote.peak(name, self.mode)

    def time_ms(self, name: str) -> float:
        """Milliseconds of one call of a candidate."""
        remote = self.remotes.get(name)
        if remote is not None:
            return remote.time_ms(name, self.mode)
        found = self.local.time_ms(name)
        if self.remotes:
            self.local.clear()
            self.stopwatch.give_back_if_scarce()
        return found
