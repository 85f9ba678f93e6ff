"""What `aepo-fast doctor` says of the processes that torchrun has started."""

from __future__ import annotations

import platform

import torch

from aepo_fast import __version__
from aepo_fast.config.resolve import auto_device
from aepo_fast.memory.devices import available_bytes, resident_bytes
from aepo_fast.rollout.load import installed_version
from aepo_fast.world import World, is_started_with_others, join

_TIMEOUT_S = 60.0


def report_ranks() -> tuple[World, str]:
    """The processes of a world, and a line about each; empty for one process.

    All of them add up a number with gloo, and with NCCL where they have GPUs.
    """
    on_gpu = auto_device().type == "cuda"
    world = join(on_gpu=on_gpu, timeout_s=_TIMEOUT_S)
    if not is_started_with_others():
        return world, ""
    device = torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")
    checks = [f"gloo {_added_up(world, torch.device('cpu'))}"]
    if on_gpu:
        checks.append(f"NCCL {_added_up(world, device)}")
    own = f"{platform.node()}, {_device(device)}; {_versions()}"
    lines = [f"  rank {rank}: {line}" for rank, line in enumerate(world.gather(own))]
    parts = world.gather(", ".join(checks))
    bad = [f"rank {rank}: {part}" for rank, part in enumerate(parts) if part != parts[0]]
    lines.append(f"  adding up over {world.size} ranks: {'; '.join([parts[0], *bad])}")
    return world, "\n".join(["ranks", *lines])


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = (number / 2**30 for number in torch.cuda.mem_get_info(device))
        return f"{device} {torch.cuda.get_device_name(device)}, {free:.1f} of {total:.1f} GiB free"
    free = (available_bytes() - resident_bytes()) / 2**30
    return f"cpu, {torch.get_num_threads()} threads, {free:.1f} GiB free"


def _versions() -> str:
    names = ("torch", "transformers")
    found = ", ".join(f"{name} {installed_version(name)}" for name in names)
    return f"aepo_fast {__version__}, {found}"


def _added_up(world: World, device: torch.device) -> str:
    number = torch.ones((), device=device)
    try:
        torch.distributed.all_reduce(number)
    except RuntimeError as error:
        return f"fails: {str(error).splitlines()[0]}"
    return "works" if number.item() == world.size else f"gives {number.item()}"
