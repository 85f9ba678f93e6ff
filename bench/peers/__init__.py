"""Adapters of the kernels that `python -m bench kernels` compares, one file each."""

from bench.peers import (
    cce,
    liger_grpo,
    liger_scaled,
    materialised,
    ours,
    prime_rl,
    quack,
    trl,
    verl,
)
from bench.peers.peer import Peer


def all_peers() -> list[Peer]:
    """Every candidate, ours first, whether it can run here or not."""
    modules = (materialised, trl, liger_scaled, liger_grpo, verl, prime_rl, cce, quack)
    return [*ours.peers(), *(peer for module in modules for peer in module.peers())]
