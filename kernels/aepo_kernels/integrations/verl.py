"""verl's fused heads, FSDP's and Megatron's, by `linear_logprob`."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any

import torch.distributed as dist
from torch import Tensor

from aepo_kernels.api import linear_logprob
from aepo_kernels.integrations import seams
from aepo_kernels.integrations.heads import head_arguments
from aepo_kernels.problem import VocabShard

_PEER = "verl"
_IGNORED = -100
_FSDP = "verl.utils.experimental.torch_functional"
_MEGATRON = "verl.utils.kernel.linear_cross_entropy"
_FORWARDS = "verl.models.transformers.dense_common"
_FSDP_PARAMETERS = "self", "hidden_states", "vocab_weights", "input_ids", "temperature"
_MEGATRON_PARAMETERS = (
    "ctx",
    "hidden",
    "weight",
    "labels",
    "temperature",
    "reduction",
    "dist_process_group",
)
# What the model whose forward runs says of its head: verl hands over the weight only.
_arguments: ContextVar[dict[str, Any] | None] = ContextVar("arguments", default=None)


def install() -> str:
    """Let verl >= 0.9 compute log-probs by `linear_logprob`; returns what was replaced.

    That is `FusedLinearForPPO`, which FSDP runs with use_fused_kernels=True, and Megatron's
    `linear_cross_entropy`. A text model's bias, softcap and logit scale, which verl's own heads
    leave out, are read from the model. Call it in every worker before the models are made. Raises
    ImportError where verl is missing, older, or a function takes other arguments.
    """
    version = seams.check_version("verl", "0.9")
    how = "install verl with its dependencies"
    fsdp, megatron = seams.import_peer(_FSDP, how), seams.import_peer(_MEGATRON, how)
    forwards = seams.import_peer(_FORWARDS, how)
    fused = fsdp.FusedLinearForPPO
    if fused.forward is not _fsdp_forward:
        where = f"verl {version}: {_FSDP}.FusedLinearForPPO.forward"
        seams.check_parameters(fused.forward, _FSDP_PARAMETERS, where)
        where = f"verl {version}: {_MEGATRON}.LinearCrossEntropy.forward"
        function = megatron.LinearCrossEntropy.forward
        seams.check_parameters(function, _MEGATRON_PARAMETERS, where)
    replaced = [seams.replace(fused, "forward", _fsdp_forward, _PEER)]
    for name in ("forward_with_torch_backend", "forward_with_triton_backend"):
        known = _knowing_the_head(getattr(forwards, name))
        replaced.append(seams.replace(forwards, name, known, _PEER))
    own = megatron.linear_cross_entropy
    for module in seams.modules_with("verl.", "linear_cross_entropy", own):
        replaced.append(seams.replace(module, "linear_cross_entropy", linear_cross_entropy, _PEER))
    return f"verl {version}: {', '.join(replaced)}"


def uninstall() -> None:
    """Put verl's own functions back; a model that was made in between keeps its forward."""
    seams.restore(_PEER)


def fused_linear_for_ppo(
    hidden_states: Tensor,
    vocab_weights: Tensor,
    input_ids: Tensor,
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies in float32, in input_ids' shape; 0 for ids of -100.

    hidden_states: [..., H]. vocab_weights: [V, H]. input_ids: [...]. temperature: a float or a
    tensor that expands to input_ids' shape. Both have a gradient.
    """
    shape, hidden_size = input_ids.shape, hidden_states.shape[-1]
    if isinstance(temperature, Tensor):
        temperature = temperature.to(hidden_states.device).expand(shape).reshape(-1)
    found = linear_logprob(
        hidden_states.reshape(-1, hidden_size),
        vocab_weights,
        input_ids.long().reshape(-1),
        temperature=temperature,
        ignore_index=_IGNORED,
        **(_arguments.get() or {}),
    )
    return found.logprob.view(shape), found.entropy.view(shape)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies in float32, [N], as Megatron's forward of verl takes them.

    hidden: [..., H]. weight: [V, H], or this rank's rows of it, equally many on all ranks of the
    group. labels: [...]. reduction: "none". With a group the gradient of hidden is this rank's
    part, as of verl's kernel: the gather of sequence parallelism before it adds the parts up.
    """
    if reduction != "none":
        raise ValueError(f"reduction = {reduction!r}: only log-probs of tokens; use 'none'")
    options: dict[str, Any] = dict(_arguments.get() or {})
    if dist_process_group is not None and dist.get_world_size(dist_process_group) > 1:
        rows, rank = weight.shape[0], dist.get_rank(dist_process_group)
        vocab = rows * dist.get_world_size(dist_process_group)
        part: dict[str, Any] = {"reduce_hidden": False}
        options["shard"] = VocabShard(rank * rows, vocab, dist_process_group, **part)
    found = linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.long().reshape(-1),
        temperature=temperature,
        ignore_index=_IGNORED,
        **options,
    )
    return found.logprob, found.entropy


def _fsdp_forward(
    self: Any,
    hidden_states: Tensor,
    vocab_weights: Tensor,
    input_ids: Tensor,
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    return fused_linear_for_ppo(hidden_states, vocab_weights, input_ids, temperature)


def _knowing_the_head(forward: Any) -> Any:
    """verl's forward of a text model, in which our heads know the model's settings."""

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _arguments.set(head_arguments(self)[1])
        try:
            return forward(self, *args, **kwargs)
        finally:
            _arguments.reset(token)

    return wrapper
