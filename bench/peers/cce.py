"""Apple's cut-cross-entropy: per-token log-likelihood, no entropy and no temperature."""

from __future__ import annotations

import importlib

import torch

from bench.peers.peer import (
    Inputs,
    Mode,
    Outputs,
    Peer,
    import_problem,
    package_version,
    shared_loss,
)

PACKAGE, MODULE = "cut-cross-entropy", "cut_cross_entropy"


def peers() -> list[Peer]:
    """Its Triton implementation."""
    peer = Peer(
        PACKAGE,
        run,
        unavailable_reason,
        lambda: package_version(PACKAGE),
        temperatures=0,
        has_entropy=False,
    )
    return [peer]


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run here, or None."""
    return import_problem(PACKAGE, MODULE) or (None if device.type == "cuda" else "needs CUDA")


def run(inputs: Inputs, mode: Mode) -> Outputs:
    """Log-prob with its default gradient filter, and the loss on it."""
    assert inputs.temperature == 1.0, "cut-cross-entropy has no temperature"
    logprob = -importlib.import_module(MODULE).linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.targets, reduction="none", impl="cce"
    )
    return Outputs(logprob, loss=shared_loss(inputs, mode, logprob))
