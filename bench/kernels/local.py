"""Candidates that run in this process: their gate values, memory and times in one mode."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.common.timing import Stopwatch, peak_extra_bytes
from bench.kernels import gate
from bench.peers.peer import Inputs, Mode, Peer


class Local:
    """Peers of this process over one problem in one mode; what a peer raises goes through."""

    def __init__(
        self, peers: Sequence[Peer], inputs: Inputs, mode: Mode, stopwatch: Stopwatch
    ) -> None:
        self.peers = {peer.name: peer for peer in peers}
        self.inputs, self.mode, self.stopwatch = inputs, mode, stopwatch

    def values(self, name: str) -> gate.Values:
        """Per-token values [N] and gradients by name, for those that the peer has."""
        return gate.compute(self.peers[name], self.inputs, self.mode)

    def peak(self, name: str) -> int | None:
        """Bytes beside inputs and gradients, None where they cannot be measured."""
        self._step(name)  # warm-up beyond the gate's call, which may have compiled
        leaves = self.inputs.hidden, self.inputs.weight
        kept = sum(x.nbytes for x in leaves if x.requires_grad) if self.mode.training else 0
        device = self.stopwatch.device
        return peak_extra_bytes(lambda: self._step(name), self.clear, kept, device)

    def time_ms(self, name: str) -> float:
        """Milliseconds of one call."""
        return self.stopwatch.time_ms(lambda: self._step(name), self.clear)

    def clear(self) -> None:
        """Drop the gradients of the last call."""
        gate.clear_gradients(self.inputs)

    def _step(self, name: str) -> None:
        with torch.set_grad_enabled(self.mode.training):
            loss = self.peers[name].run(self.inputs, self.mode).loss
        if loss is not None:
            loss.backward()
