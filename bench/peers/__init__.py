"""Adapters of the kernels that `python -m bench kernels` compares, one file each."""

from bench.peers import (
    cce,
    liger_grpo,
    liger_scaled,
    materialised,
    ours,
    prime_rl,
    quack,
    torch_linear,
    trl,
    unsloth,
    verl,
)
from bench.peers.peer import Peer

# Name of a package's folder under --peers -> the adapters of that package. Each package runs in a
# process of its own.
PACKAGES = {
    "torch": (torch_linear,),
    "trl": (trl,),
    "liger": (liger_scaled, liger_grpo),
    "verl": (verl,),
    "prime_rl": (prime_rl,),
    "unsloth": (unsloth,),
    "cce": (cce,),
    "quack": (quack,),
}


def own_peers() -> list[Peer]:
    """Our backends and plain torch, which run in the process that compares."""
    return [*ours.peers(), *materialised.peers()]


def peers_of(package: str) -> list[Peer]:
    """The candidates of one of PACKAGES, whether they can run here or not."""
    return [peer for module in PACKAGES[package] for peer in module.peers()]


def all_peers() -> list[Peer]:
    """Every candidate, ours first, whether it can run here or not."""
    return [*own_peers(), *(peer for package in PACKAGES for peer in peers_of(package))]
