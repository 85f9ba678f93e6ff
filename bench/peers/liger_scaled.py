"""Liger's fused linear scaled cross entropy: CuTe on sm_90, chunked torch elsewhere."""

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

PACKAGE, MODULE = "liger-kernel", "liger_kernel.ops.fused_linear_scaled_cross_entropy"
SM90_MODULE = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"


def peers() -> list[Peer]:
    """Liger's function, whichever implementation it dispatches to."""
    return [
        Peer("Liger scaled CE", run, unavailable_reason, version),
    ]


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run here, or None."""
    return import_problem(PACKAGE, MODULE, *((SM90_MODULE,) if _is_hopper() else ()))


def version() -> str | None:
    """The installed version and which implementation the device gets; None without one."""
    found = installed_version(PACKAGE)
    return found and f"{found} ({'sm_90' if _is_hopper() else 'chunked torch'})"


def _is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def run(inputs: Inputs, mode: Mode) -> Outputs:
    """Negated log-likelihood and entropy, and the loss on them."""
    function = importlib.import_module(MODULE).LigerFusedLinearScaledCrossEntropyFunction
    problem = inputs.hidden, inputs.weight, inputs.targets
    entropy, second = None, None
    if mode.loss == "ce":
        nll = function.apply(*problem, temperature=inputs.temperature)
    else:
        nll, entropy = function.apply(*problem, temperature=inputs.temperature, return_entropy=True)
    if mode.second:
        second = -function.apply(*problem, temperature=inputs.second_temperature)
    return Outputs(-nll, entropy, second, shared_loss(inputs, mode, -nll))
