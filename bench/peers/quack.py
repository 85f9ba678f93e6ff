"""QuACK's chunked linear cross entropy: a summed cross entropy and nothing else."""

from __future__ import annotations

import importlib

import torch

from bench.common.environment import installed_version
from bench.peers.peer import Inputs, Mode, Outputs, Peer, import_problem

PACKAGE, MODULE = "quack-kernels", "quack.linear_cross_entropy"


def peers() -> list[Peer]:
    """QuACK's function, with the pipeline that it chooses."""
    peer = Peer(
        "QuACK",
        run,
        unavailable_reason,
        lambda: installed_version(PACKAGE),
        losses=("ce",),
        temperatures=0,
        has_entropy=False,
        per_token=False,
    )
    return [peer]


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run here, or None."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return "needs sm_90 or newer"
    return import_problem(PACKAGE, MODULE) or (None if device.type == "cuda" else "needs CUDA")


def run(inputs: Inputs, mode: Mode) -> Outputs:
    """The summed cross entropy; no per-token values."""
    function = importlib.import_module(MODULE).chunked_linear_cross_entropy
    return Outputs(loss=function(inputs.hidden, inputs.weight, inputs.targets, reduction="sum"))
