"""unsloth-zoo's fused log-prob, entropy and cross entropy: Triton, torch operations on a CPU."""

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

PACKAGE, MODULE = "unsloth_zoo", "unsloth_zoo.fused_losses.fused_linear"


def peers() -> list[Peer]:
    """The functions that its GRPO and its cross entropy call, with their own chunks."""
    return [Peer("unsloth-zoo", run, unavailable_reason, lambda: installed_version(PACKAGE))]


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run here, or None."""
    # The package itself refuses to be imported without unsloth, of which the kernels use nothing.
    skip_package_imports("unsloth_zoo", "unsloth_zoo.fused_losses")
    return import_problem(PACKAGE, MODULE)


def run(inputs: Inputs, mode: Mode) -> Outputs:
    """Log-prob and entropy (without gradient), and the loss on them; or a summed cross entropy."""
    module = importlib.import_module(MODULE)
    hidden, weight, targets = inputs.hidden, inputs.weight, inputs.targets
    if mode.loss == "ce":
        loss = module.fused_linear_cross_entropy(hidden, weight, None, targets, divisor=1.0)
        return Outputs(loss=loss)
    logprob, entropy = module.fused_linear_logprobs(
        hidden,
        weight,
        targets,
        temperature=inputs.temperature,
        return_entropy=True,
        entropy_requires_grad=False,
    )
    second = None
    if mode.second:
        second = module.fused_linear_logprobs(
            hidden, weight, targets, temperature=inputs.second_temperature
        )
    return Outputs(logprob, entropy, second, shared_loss(inputs, mode, logprob))
