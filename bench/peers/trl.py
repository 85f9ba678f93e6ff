"""TRL's chunked log-prob (>= 1.16): cuBLAS tiles and row kernels, torch operations on CPU."""

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

PACKAGE, MODULE = "trl", "trl.kernels"
# Its backward imports this one, which needs more packages than the forward.
BACKWARD_MODULE = "trl.trainer.utils"
# The vocabulary width of a tile that its own trainers pass.
CHUNK_VOCAB = 32768


def peers() -> list[Peer]:
    """TRL's function."""
    return [Peer("TRL chunked", run, unavailable_reason, lambda: package_version(PACKAGE))]


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run here, or None."""
    return import_problem(PACKAGE, MODULE, BACKWARD_MODULE)


def run(inputs: Inputs, mode: Mode) -> Outputs:
    """Log-prob and entropy, and the loss on them."""
    logprob, entropy = _call(inputs, inputs.temperature, mode.loss != "ce")
    second = _call(inputs, inputs.second_temperature, False)[0] if mode.second else None
    return Outputs(logprob, entropy, second, shared_loss(inputs, mode, logprob))


def _call(
    inputs: Inputs, temperature: float, wants_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    logprob, entropy, *_ = importlib.import_module(MODULE).ChunkedLogProbFunction.apply(
        inputs.hidden,
        inputs.weight,
        None,
        inputs.targets,
        temperature,
        min(CHUNK_VOCAB, len(inputs.weight)),
        None,
        1.0,
        ("entropy",) if wants_entropy else (),
    )
    return logprob, entropy
