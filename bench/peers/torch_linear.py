"""torch's own chunked F.linear_cross_entropy (torch >= 2.13): no entropy and no temperature."""

from __future__ import annotations

import torch
from torch.nn import functional

from bench.peers.peer import Inputs, Mode, Outputs, Peer, shared_loss


def peers() -> list[Peer]:
    """The function with the chunks and the precision that it chooses by itself."""
    peer = Peer(
        "torch linear_cross_entropy",
        run,
        unavailable_reason,
        lambda: torch.__version__,
        temperatures=0,
        has_entropy=False,
    )
    return [peer]


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run here, or None."""
    if hasattr(functional, "linear_cross_entropy"):
        return None
    return f"needs torch 2.13 or newer, this is {torch.__version__}"


def run(inputs: Inputs, mode: Mode) -> Outputs:
    """Log-prob, and the loss on it; of cross entropy alone its sum, without per-token values."""
    assert inputs.temperature == 1.0, "F.linear_cross_entropy has no temperature"
    problem = inputs.hidden, inputs.weight, inputs.targets
    chunked = torch.nn.LinearCrossEntropyOptions()
    if mode.loss == "ce":
        # With a sum the gradients are computed in the forward pass, which saves a GEMM.
        return Outputs(
            loss=functional.linear_cross_entropy(*problem, reduction="sum", options=chunked)
        )
    logprob = -functional.linear_cross_entropy(*problem, reduction="none", options=chunked)
    return Outputs(logprob, loss=shared_loss(inputs, mode, logprob))
