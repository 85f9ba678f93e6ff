"""verl's Triton linear cross entropy: log-prob and entropy."""

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
    skip_package_imports,
)

PACKAGE, MODULE = "verl", "verl.utils.kernel.linear_cross_entropy"
KERNELS = "verl.utils.kernel.kernels"


def peers() -> list[Peer]:
    """verl's kernel in its default backward."""
    return [Peer("verl Triton", run, unavailable_reason, lambda: installed_version(PACKAGE))]


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run here, or None."""
    problem = import_problem(PACKAGE, MODULE, KERNELS)
    if problem is not None and installed_version(PACKAGE) is not None:
        # Their __init__ files import the whole trainer (ray, tensordict), unused by the kernel.
        skip_package_imports("verl", "verl.utils")
        problem = import_problem(PACKAGE, MODULE, KERNELS)
    return problem or (None if device.type == "cuda" else "needs CUDA")


def run(inputs: Inputs, mode: Mode) -> Outputs:
    """Log-prob and entropy, and the loss on them."""
    function = importlib.import_module(MODULE).linear_cross_entropy
    problem = inputs.hidden, inputs.weight, inputs.targets
    logprob, entropy = function(*problem, inputs.temperature, "none", None)
    second = None
    if mode.second:
        second, _ = function(*problem, inputs.second_temperature, "none", None)
    return Outputs(logprob, entropy, second, shared_loss(inputs, mode, logprob))
