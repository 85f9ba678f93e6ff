"""Weights in shards, which FSDP2 of torch makes whole only while their layer computes.

Nothing here imports torch's FSDP before `shard` is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine
from aepo_fast.group_connections import noting_connections
from aepo_fast.model.tensor_parallel import split_layers
from aepo_fast.world import World

Result = TypeVar("Result")
_RUN = "run_inside_forward"
_NEEDS_GPU = ("flash_attention_2", "varlen")
_made: list[Any] = []  # the process group, where `shard` has made it


def device_mesh(machine: Machine) -> Any:
    """The processes of a run: replicas of shards of the parts of a layer.

    Its dimensions are "replicate", "shard" and "split", but for those of one process; "shard" is
    always there. Processes that split a layer are neighbours.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.distributed_c10d import (
        _set_pg_timeout,  # pyright: ignore[reportPrivateUsage]
    )

    _join_alone(machine)
    sizes = {
        "replicate": machine.replicas,
        "shard": machine.data.size // machine.replicas,
        "split": machine.tensor_parallel,
    }
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    with noting_connections():
        shape, names = tuple(sizes.values()), tuple(sizes)
        mesh = init_device_mesh(machine.device.type, shape, mesh_dim_names=names)
    for name in sizes:  # torch gives groups of some of the ranks a timeout of its own
        _set_pg_timeout(timedelta(seconds=machine.world.timeout_s), mesh.get_group(name))
    return mesh


def shard(model: PreTrainedModel, machine: Machine, mesh: Any, *, offload: bool) -> None:
    """Put a model's weights into shards, one group a layer and one for all else.

    The last group holds embedding, last norm and head, which may be one tensor. Adapters are there
    already: those that came later would get wrong gradients. Weights become whole in the machine's
    compute_dtype, those of norms and embeddings, too; gradients are added up in float32.

    mesh: that of `device_mesh`. Where it says so, layers are split first, see `split_layers`.
    offload: the shards lie in CPU memory, pinned beside a GPU, and with them gradients and the
    optimizer's state, whose step the processor takes. Raises ConfigError for a model without
    layers to be told apart.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    if not layers:
        reason = f"the layers of {type(model).__name__} cannot be told apart"
        if machine.world.size > 1:
            raise ConfigError("WORLD_SIZE", machine.world.size, reason, "Start one process")
        raise ConfigError("trainer.offload", "all", reason, 'Use "optimizer"')
    embedding: Any = model.get_input_embeddings()
    embedding.sparse = False  # sparse gradients cannot be put together
    if machine.tensor_parallel > 1:
        split_layers(model, mesh["split"])
    names = tuple(name for name in mesh.mesh_dim_names if name != "split")
    options: dict[str, Any] = {
        "mesh": mesh[names],
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=machine.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy(machine.is_gpu) if offload else OffloadPolicy(),
    }
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by numbers of the whole step. Only both together sum: the first
            # alone fails with gloo, and gives zeros with NCCL in bfloat16.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    setattr(model, _RUN, MethodType(lambda _, run: run(), model))
    register_fsdp_forward_method(model, _RUN)


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether `shard` was called for a model."""
    return _RUN in vars(model)


def inside_forward(model: PreTrainedModel, run: Callable[[], Result]) -> Result:
    """What `run` returns while embedding and head of a sharded model are whole.

    Its tensors, in a tuple, may be used in a backward pass.
    """
    return getattr(model, _RUN)(run)


def reshard(model: PreTrainedModel) -> None:
    """Forget the whole weights of embedding and head.

    They stay after a forward pass that no backward pass follows, and the next one would compute
    with them, although the shards have been updated since.
    """
    module: Any = model
    module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """What a shard is a part of; any other tensor as it is."""
    shard: Any = tensor
    if not hasattr(shard, "full_tensor"):
        return tensor
    shard = shard.detach()
    return shard.to_local() if shard.device_mesh.size() == 1 else shard.full_tensor()


def whole_on_first(tensor: Tensor, world: World) -> Tensor:
    """What a shard is a part of, on the first rank of a world; on others it may still be a shard.

    All ranks call this. A world that was made anew gathers by its control group, over CPU memory.
    """
    shard: Any = tensor
    if not (world.is_anew and in_parts(tensor)):
        return whole(tensor)
    (chunk,) = shard.__create_chunk_list__()
    parts = world.gather_on_first((tuple(chunk.offsets), shard.detach().to_local().cpu().clone()))
    if not parts:
        return tensor
    found = parts[0][1].new_empty(shard.shape)
    for offsets, part in parts:
        where = tuple(slice(at, at + n) for at, n in zip(offsets, part.shape, strict=True))
        found[where] = part
    return found


def whole_weights(
    model: PreTrainedModel, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors of all parameters; one at a time where others have parts of them.

    dtype: of those that others have parts of, but for vectors, which may matter in all their
    digits; None leaves each in its own. All processes must take all of them, in this order.
    """
    for name, parameter in model.named_parameters():
        cast = dtype is not None and in_parts(parameter) and parameter.ndim > 1
        yield name, whole(parameter.detach().to(dtype) if cast else parameter)


def in_parts(tensor: Tensor) -> bool:
    """Whether other processes have parts of a tensor."""
    mesh: Any = getattr(tensor, "device_mesh", None)
    return mesh is not None and mesh.size() > 1


def whole_state(state: dict[str, Any]) -> dict[str, Any]:
    """A state_dict of model or optimizer as it were without shards."""
    return pytree.tree_map_only(Tensor, whole, state)


def state_in_shards(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """What `whole_state` returned, as an optimizer of shards takes it; another's as it is."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    if not any(hasattr(one, "full_tensor") for one in parameters):
        return state
    from torch.distributed.tensor import distribute_tensor

    def in_shards(value: Any, parameter: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        where = parameter.device_mesh, parameter.placements
        # All ranks have read the same file, so that none sends its value to others.
        return distribute_tensor(value, *where, src_data_rank=None).to(parameter.device)

    numbers = [number for group in state["param_groups"] for number in group["params"]]
    numbered = dict(zip(numbers, parameters, strict=True))
    entries = {
        number: {name: in_shards(value, numbered[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": entries}


@contextmanager
def on_cpu(model: PreTrainedModel, machine: Machine) -> Iterator[Machine]:
    """A machine for a model whose weights are still on the CPU, before they are in shards.

    While it is open, the model's attention is one that runs there.
    """
    attention: Any = model.config._attn_implementation
    if attention in _NEEDS_GPU:
        model.set_attn_implementation("sdpa")
    try:
        cpu = torch.device("cpu")
        yield dataclasses.replace(machine, device=cpu, head_backend="reference")
    finally:
        if attention in _NEEDS_GPU:
            model.set_attn_implementation(attention)


def _join_alone(machine: Machine) -> None:
    """Make a process group of this process, which shards need even where nobody shares them."""
    from torch import distributed

    if not distributed.is_initialized():  # vLLM has one
        # Shards in CPU memory meet gloo, and whole weights NCCL.
        backend = "cpu:gloo,cuda:nccl" if machine.is_gpu else "gloo"
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        _made.append(distributed.group.WORLD)


def leave() -> None:
    """End the process group that `shard` has made, where it has."""
    from torch import distributed

    while _made:
        distributed.destroy_process_group(_made.pop())
