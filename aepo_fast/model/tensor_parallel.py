"""Layers that several processes split among them, by the plan that transformers has for a model.

The processes of such a group have the same micro-batches and hidden states. Each computes its
attention heads and its part of each MLP, and holds its part of the vocabulary in embedding and
head. https://huggingface.co/docs/transformers/main/perf_infer_gpu_multi
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from aepo_fast.config.errors import ConfigError
from aepo_kernels import VocabShard

# A norm over one head: each process has the gradient of its own heads.
_PARTIAL = "replicated_with_grad_allreduce"
_STYLES = {"colwise", "rowwise", "embedding_rowwise", "colwise_gather_output", _PARTIAL}
_HEADS = ("num_attention_heads", "num_key_value_heads")


def check_tensor_parallel(size: int, config: PretrainedConfig) -> None:
    """Raise ConfigError where a model of some settings cannot be split among `size` processes."""

    def refuse(reason: str, fix: str) -> NoReturn:
        raise ConfigError("trainer.tensor_parallel", size, reason, fix)

    if size == 1:
        return
    if _apply() is None:
        reason = f"transformers {transformers.__version__} cannot split a model that it has built"
        refuse(reason, "Install transformers 5.23 or newer")
    text = config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None)
    kind = text.model_type
    if not plan:
        refuse(f"transformers has no plan to split {kind!r}", "Set it to 1")
    unknown = sorted(set(plan.values()) - _STYLES)
    if unknown:
        refuse(f"the plan of {kind!r} has {unknown[0]!r}, which is not supported", "Set it to 1")
    for name in _HEADS:
        heads = getattr(text, name, None) or size
        if heads % size:
            reason = f"does not divide the model's {heads} {name}"
            refuse(reason, f"Use 1 or another divisor of {heads}")


def split_layers(model: PreTrainedModel, mesh: Any) -> None:
    """Split a model's weights among the processes of a mesh of one dimension, as its plan says.

    Each keeps its part of each weight, and all of those that the plan does not split. All of them
    become DTensors of the same mesh, so that one optimizer has them. Raises ConfigError where
    embedding and head are one tensor that the plan does not split by the vocabulary.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    apply = _apply()
    assert apply is not None, "refused by check_tensor_parallel"

    def place(module: nn.Module, name: str, placement: Any) -> None:
        whole = module._parameters[name]
        assert whole is not None
        # All of them have the same weights, so that none sends its own to others.
        part = distribute_tensor(whole.detach(), mesh, [placement], src_data_rank=None)
        module._parameters[name] = nn.Parameter(part, requires_grad=whole.requires_grad)

    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    tied = head.weight is embedding.weight
    modules = dict(model.named_modules())
    heads = {name for name, module in modules.items() if module is head}
    # Of weights with such a name, and of modules.
    plan = {
        name: style
        for name, style in model._expand_parallel_plan(model.tp_plan).items()
        if name not in heads and name.rpartition(".")[0] not in heads
    }
    partial = {
        modules[name] for name, style in plan.items() if style == _PARTIAL and name in modules
    }
    apply(model, mesh, {name: style for name, style in plan.items() if style != _PARTIAL})
    if tied:
        head.weight = embedding.weight
    for name in head._parameters if not tied else ():
        if head._parameters[name] is not None:
            place(head, name, Shard(0))
    if not (isinstance(head.weight, DTensor) and head.weight.placements == (Shard(0),)):
        reason = (
            f"the plan of {type(model).__name__} does not split its embedding by the vocabulary"
        )
        raise ConfigError("trainer.tensor_parallel", mesh.size(), reason, "Set it to 1")
    for module in modules.values():
        names = [n for n, one in module._parameters.items() if one is not None]
        whole = [name for name in names if not isinstance(module._parameters[name], DTensor)]
        for name in whole:
            place(module, name, Replicate())
        if whole:
            _compute_locally(module, whole, mesh, is_partial=module in partial)


def is_split(value: Any) -> bool:
    """Whether a value is a weight of which each process of a group has a part."""
    return hasattr(value, "full_tensor")


def part_of_head(weight: Tensor, settings: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """This process's part of what `head_arguments` returns, and where it is in the vocabulary.

    weight: a DTensor [V, H], split by rows; its part is [v, H].
    """
    shard, parts = VocabShard.from_dtensor(weight), {"": weight, **settings}
    local = {name: one.to_local() if is_split(one) else one for name, one in parts.items()}
    return local.pop(""), {**local, "shard": shard}


def _compute_locally(module: nn.Module, names: list[str], mesh: Any, *, is_partial: bool) -> None:
    """Have a module compute with plain tensors where its weights are DTensors.

    is_partial: a process has a part of their gradient, and all have it otherwise.
    """
    from torch.distributed.tensor import Partial, Replicate

    placement = [Partial() if is_partial else Replicate()]
    forward: Callable[..., Any] = module.forward

    @contextmanager
    def local() -> Iterator[None]:
        given = {name: module._parameters[name] for name in names}
        for name, one in given.items():
            weight: Any = one
            module._parameters[name] = weight.to_local(grad_placements=placement)
        try:
            yield
        finally:
            module._parameters.update(given)

    @functools.wraps(forward)
    def run(*args: Any, **options: Any) -> Any:
        with local():
            return forward(*args, **options)

    module.forward = run


def _apply() -> Callable[..., Any] | None:
    """The function of transformers that splits a model by a plan; older versions have none."""
    try:
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism
    except ImportError:
        return None
    return apply_tensor_parallelism
