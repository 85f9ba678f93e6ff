"""Liger's fused linear GRPO: a whole loss over sequences, without entropy."""

from __future__ import annotations

import importlib

import torch

from bench.common.environment import installed_version
from bench.peers.peer import (
    CLIP_HIGH,
    CLIP_LOW,
    Inputs,
    Mode,
    Outputs,
    Peer,
    import_problem,
)

PACKAGE, MODULE = "liger-kernel", "liger_kernel.chunked_loss"
# Its chunks are whole sequences; its own log-prob function works on at most this many tokens.
CHUNK_TOKENS = 2048


def peers() -> list[Peer]:
    """Liger's loss."""
    peer = Peer(
        "Liger GRPO",
        run,
        unavailable_reason,
        lambda: installed_version(PACKAGE),
        losses=("grpo",),
        has_entropy=False,
        per_token=False,
    )
    return [peer]


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run here, or None."""
    return import_problem(PACKAGE, MODULE)


def run(inputs: Inputs, mode: Mode) -> Outputs:
    """The summed clipped surrogate by Liger's own formula; no per-token values."""
    rows = inputs.num_sequences
    length = len(inputs.targets) // rows
    shape = (rows, length)
    loss_module = importlib.import_module(MODULE).LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=inputs.hidden.is_cuda,
        use_ref_model=False,
        chunk_size=max(1, CHUNK_TOKENS // length),
        epsilon_low=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        loss_type="dr_grpo",
        max_completion_length=length,
        temperature=inputs.temperature,
    )
    loss, _ = loss_module(
        inputs.hidden.view(*shape, -1),
        inputs.weight,
        inputs.targets.view(shape),
        torch.ones(shape, dtype=torch.int64, device=inputs.hidden.device),
        inputs.advantage.view(shape)[:, 0].contiguous(),
        old_per_token_logps=inputs.old_logprob.view(shape),
    )
    # dr_grpo divides by rows * length; the benchmark's loss is a sum.
    return Outputs(loss=loss * len(inputs.targets))
