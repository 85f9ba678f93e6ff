"""Apple's cut-cross-entropy: per-token log-likelihood, no entropy and no temperature."""

from __future__ import annotations

import functools
import importlib

import torch

from bench.common.environment import installed_version
from bench.peers.peer import (
    Inputs,
    Mode,
    Outputs,
    Peer,
    import_problem,
    shared_loss,
)

PACKAGE, MODULE = "cut-cross-entropy", "cut_cross_entropy"


def peers() -> list[Peer]:
    """Its Triton implementation with its default gradient filter, and without it."""
    return [_peer(PACKAGE, "high"), _peer(f"{PACKAGE} (no filter)", None)]


def _peer(name: str, filter_eps: str | None) -> Peer:
    return Peer(
        name,
        functools.partial(run, filter_eps),
        unavailable_reason,
        lambda: installed_version(PACKAGE),
        temperatures=0,
        has_entropy=False,
    )


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run here, or None."""
    return import_problem(PACKAGE, MODULE) or (None if device.type == "cuda" else "needs CUDA")


def run(filter_eps: str | None, inputs: Inputs, mode: Mode) -> Outputs:
    """Log-prob, and the loss on it."""
    assert inputs.temperature == 1.0, "cut-cross-entropy has no temperature"
    logprob = -importlib.import_module(MODULE).linear_cross_entropy(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        reduction="none",
        impl="cce",
        filter_eps=filter_eps,
    )
    return Outputs(logprob, loss=shared_loss(inputs, mode, logprob))
