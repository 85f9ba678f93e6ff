"""TRL's chunked log-prob (>= 1.16): cuBLAS tiles and row kernels, torch operations on CPU."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from bench.common.environment import installed_version
from bench.peers.peer import (
    Inputs,
    Mode,
    Outputs,
    Peer,
    import_problem,
    shared_loss,
)

PACKAGE, MODULE = "trl", "trl.kernels"
# Its backward imports this one, which needs more packages than the forward.
BACKWARD_MODULE = "trl.trainer.utils"
# The vocabulary width of a tile that its own trainers pass.
CHUNK_VOCAB = 32768


def peers() -> list[Peer]:
    """TRL's function."""
    return [Peer("TRL chunked", run, unavailable_reason, lambda: installed_version(PACKAGE))]


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run here, or None."""
    return import_problem(PACKAGE, MODULE, BACKWARD_MODULE)


def run(inputs: Inputs, mode: Mode) -> Outputs:
    """Log-prob and entropy, and the loss on them."""
    problem = inputs.hidden, inputs.weight, inputs.targets
    logprob, entropy = scores(*problem, inputs.temperature, wants_entropy=mode.loss != "ce")
    second = None
    if mode.second:
        second, _ = scores(*problem, inputs.second_temperature, wants_entropy=False)
    return Outputs(logprob, entropy, second, shared_loss(inputs, mode, logprob))


def scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    *,
    wants_entropy: bool,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob and entropy, [N] float32."""
    logprob, entropy, *_ = importlib.import_module(MODULE).ChunkedLogProbFunction.apply(
        hidden,
        weight,
        bias,
        targets,
        temperature,
        min(CHUNK_VOCAB, len(weight)),
        softcap,
        logit_scale,
        ("entropy",) if wants_entropy else (),
    )
    return logprob, entropy
