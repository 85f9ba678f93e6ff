# vLLM is installed by choice:
# pyright: reportMissingImports=false
"""vLLM over ranks: in the processes and groups that there are already."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from aepo_fast.world import World

SHARED_MEMORY = Path("/dev/shm")


def settings_over_ranks(world: World, ranks: int, on_gpu: bool) -> dict[str, Any]:
    """vLLM's settings for an engine that this rank has with its neighbours, `ranks` of them."""
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # where it looks for its GPU
    settings = {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": ranks}
    # On a CPU, a prompt that is computed in parts cannot have a seed.
    return settings if on_gpu else {**settings, "enable_chunked_prefill": False}


@contextmanager
def own_shared_memory(world: World) -> Iterator[None]:
    """Give the shared memory of an engine that starts on CPU ranks a name of its own.

    vLLM names it by the ranks alone: it would not start beside another run, or after one that was
    killed. Once all ranks have it open, nothing needs the name: it goes, and a kill leaves nothing.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    plain, own = _CPUSHMDistributed.make_group_name, world.on_first(lambda: uuid4().hex)

    def named(communicator: Any) -> str:
        return f"aepo-fast-{own}-{plain(communicator).lstrip('/')}"

    _CPUSHMDistributed.make_group_name = staticmethod(named)
    try:
        yield
    finally:
        _CPUSHMDistributed.make_group_name = staticmethod(plain)
        for path in SHARED_MEMORY.glob(f"aepo-fast-{own}-*"):
            path.unlink(missing_ok=True)
