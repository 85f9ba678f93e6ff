"""The optimizer's state on disk: one file of one process, a folder of several.

torch.distributed.checkpoint writes the folder, of which each process writes and reads its part, as
many as there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from aepo_fast.config.errors import ConfigError
from aepo_fast.model.sharded import state_in_shards, whole_state
from aepo_fast.world import ALONE, World

OPTIMIZER_NAME, FOLDER_NAME = "optimizer.pt", "optimizer"


def save_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Path, world: World) -> None:
    """Write an optimizer's state; all ranks call this.

    Raises OSError or RuntimeError where it cannot be written.
    """
    if world.size == 1:
        torch.save(whole_state(optimizer.state_dict()), checkpoint / OPTIMIZER_NAME)
        return
    parts = _distributed_checkpoint()
    # In safetensors, not torch's own files: reading those runs code that a file holds.
    writer = parts.HuggingFaceStorageWriter(str(checkpoint / FOLDER_NAME), save_distributed=True)
    state = _named(optimizer.state_dict()["state"], world)
    with _as_runtime_errors():
        parts.save(state, storage_writer=writer, process_group=world.control)


def load_optimizer(
    checkpoint: Path, optimizer: torch.optim.Optimizer, world: World = ALONE
) -> None:
    """Restore the state of the optimizer saved in a checkpoint; its settings stay as built.

    Raises ConfigError if the checkpoint's weights were held in another dtype.
    """
    if (checkpoint / FOLDER_NAME).is_dir():
        _load_parts(checkpoint / FOLDER_NAME, optimizer, world)
        return
    saved = torch.load(checkpoint / OPTIMIZER_NAME, weights_only=True, map_location="cpu")
    built = optimizer.state_dict()
    before, now = ("bfloat16" if "masters" in part else "float32" for part in (saved, built))
    if before != now:
        raise ConfigError(
            "model.dtype",
            now,
            f"the weights of the checkpoint {checkpoint} were trained as {before!r}",
            "Resume with that dtype, or choose another output_dir",
        )
    # Left to torch, weight decay, betas and eps would be those of the run that saved.
    parts = [(saved, built)] if "param_groups" in saved else [(saved[k], built[k]) for k in built]
    for part, own_part in parts:
        for group, own in zip(part["param_groups"], own_part["param_groups"], strict=True):
            group |= {**own, "params": group["params"]}
    optimizer.load_state_dict(state_in_shards(optimizer, saved))


def _load_parts(folder: Path, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Read the state of a run of several processes in the place of a new optimizer's."""
    _make_state(optimizer)
    built = optimizer.state_dict()
    state = _named(built["state"], world)
    parts = _distributed_checkpoint()
    reader = parts.HuggingFaceStorageReader(str(folder))
    missing = state.keys() - reader.read_metadata().state_dict_metadata.keys()
    if missing:
        reason = f"the checkpoint {folder.parent} of another number has no {min(missing)}"
        fix = "Resume its 8-bit optimizer with as many processes as it had"
        raise ConfigError("WORLD_SIZE", world.size, reason, fix)
    with _as_runtime_errors():
        options = {"process_group": world.control, "no_dist": world.size == 1}
        parts.load(state, storage_reader=reader, **options)
    optimizer.load_state_dict(built)


def _named(state: dict[int, dict[str, Any]], world: World) -> dict[str, Tensor]:
    """The tensors of parameters by a name that says which, e.g. "3.exp_avg".

    The 8-bit numbers of a shard are in blocks of its own, so their names say whose they are.
    """
    found: dict[str, Tensor] = {}
    for number, entry in state.items():
        for name, value in entry.items():
            key = f"{number}.{name}"
            own = value.to_local() if hasattr(value, "to_local") else value
            if is_traceable_wrapper_subclass(own):
                for inner in own.__tensor_flatten__()[0]:
                    found[f"{key}.{inner} of {world.rank}/{world.size}"] = getattr(own, inner)
            else:
                found[key] = value if value.ndim else value.reshape(1)
    return found


def _distributed_checkpoint() -> Any:
    from torch.distributed import checkpoint  # only here: importing it takes seconds

    return checkpoint


@contextmanager
def _as_runtime_errors() -> Iterator[None]:
    """Raise torch's error, which is no Exception, as one, with the first failure of a rank."""
    try:
        yield
    except _distributed_checkpoint().CheckpointException as error:
        rank, (failure, _) = next(iter(error.failures.items()))
        raise RuntimeError(f"rank {rank}: {failure}") from None


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer make its state, by a step that changes nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
