"""prime-rl's chunked log-prob and entropy in eager PyTorch."""

from __future__ import annotations

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

PACKAGE, MODULE = "prime-rl", "prime_rl.trainer.models.layers.lm_head"
CHUNK_TOKENS = 8192


def peers() -> list[Peer]:
    """The function behind its fused output layer."""
    return [Peer(PACKAGE, run, unavailable_reason, lambda: installed_version(PACKAGE))]


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run here, or None."""
    return import_problem(PACKAGE, MODULE)


def run(inputs: Inputs, mode: Mode) -> Outputs:
    """Log-prob and entropy (without gradient), and the loss on them."""
    function = importlib.import_module(MODULE)._SequenceChunkedLogProbEntropyFn
    problem = inputs.hidden, inputs.weight, inputs.targets
    ones = torch.ones_like(inputs.advantage)
    logprob, entropy = function.apply(*problem, ones / inputs.temperature, CHUNK_TOKENS)
    second = None
    if mode.second:
        second, _ = function.apply(*problem, ones / inputs.second_temperature, CHUNK_TOKENS)
    return Outputs(logprob, entropy, second, shared_loss(inputs, mode, logprob))
