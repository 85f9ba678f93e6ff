"""A model of transformers whose forward gives log-probs and entropies instead of logits.

Importing this module needs transformers.
"""

from __future__ import annotations

import functools
import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from aepo_kernels.api import linear_logprob
from aepo_kernels.integrations.heads import (
    backbone_of,
    compare_logits,
    head_arguments,
    relative_error,
    unwrapped,
)

_IGNORED = -100
_TEMPERATURE, _BASE = "_fused_temperature", "_fused_base"


@dataclass
class FusedLogprobOutput(ModelOutput):
    """What a fused model returns for `fused_logprobs=True`; tokens labelled -100 are 0.

    loss: [], the cross-entropy of the labels at the temperature, as the model's own loss is at 1.
    logprobs, entropy: [B, L - 1] in nats, or [B, L] for shift_labels; float32, differentiable.
    aux_loss: [], with output_router_logits the experts' load-balancing loss, a part of the loss.
    """

    loss: Tensor | None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    aux_loss: Tensor | None = None


def fuse_head(model: Any, temperature: float = 1.0, check: bool = True) -> Any:
    """Let a model also return log-probs and entropies, without logits in memory; returns the model.

    `model(input_ids, attention_mask=..., labels=labels, fused_logprobs=True)` then returns a
    `FusedLogprobOutput`. labels: [B, L], shifted inside as transformers does, -100 for tokens to
    leave out; or shift_labels, [B, L], that are shifted already. num_items_in_batch: what the loss
    is divided by instead of the number of labels, as Trainer passes it. temperature: divides the
    logits; a call can give its own, a float or [B, L] for the tokens that predict. Without
    fused_logprobs the forward is the model's own.

    The model's class is replaced by a subclass, so copies and pickles run their own weights, and
    isinstance and save_pretrained see what they saw. Fuse before peft, DDP or FSDP wrap the model.
    check: compare the head once with the model's own logits (two passes over four tokens in eval
    mode), and raise ValueError where they differ. Raises ValueError for a head that
    `head_arguments` does not know, and for an encoder-decoder.
    """
    model = unwrapped(model)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} has an encoder and a decoder; use linear_logprob")
    for known in (head_arguments, backbone_of):  # what they refuse, they refuse now
        known(model)
    if not is_fused(model):
        if "forward" in vars(model):
            reason = "has a forward of its own on the instance, which would hide the fused one"
            raise ValueError(f"{type(model).__name__} {reason}; fuse the model first")
        if check:
            _check(model)
        model.__class__ = _fused_class(type(model))
    setattr(model, _TEMPERATURE, temperature)
    return model


def unfuse_head(model: Any) -> Any:
    """Undo `fuse_head`; returns the model, and changes nothing where it is not fused."""
    model = unwrapped(model)
    if is_fused(model):
        base = vars(type(model)).get(_BASE)
        if base is None:
            raise ValueError(f"{type(model).__name__} wraps a fused model; unwrap it first")
        model.__class__ = base
        delattr(model, _TEMPERATURE)
    return model


def is_fused(model: Any) -> bool:
    """Whether `fuse_head` was called on a model, or on what it wraps."""
    return hasattr(unwrapped(model), _TEMPERATURE)


def label_logprobs(
    model: Any,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    num_items_in_batch: Tensor | float | None = None,
    **inputs: Any,
) -> FusedLogprobOutput:
    """Log-probs and entropies of a transformers model's labels; see `fuse_head`.

    inputs: what the backbone takes, such as input_ids, attention_mask and position_ids.
    """
    if labels is None and shift_labels is None:
        raise ValueError("labels = None: there is nothing to score; pass labels or shift_labels")
    kept = inputs.pop("logits_to_keep", 0)
    if isinstance(kept, Tensor) or kept != 0:
        raise ValueError("logits_to_keep: there are no logits; label the other tokens -100")
    inputs.pop("return_dict", None)
    inputs["use_cache"] = False
    routed = getattr(model.config.get_text_config(), "output_router_logits", False)
    if routed:
        inputs.setdefault("output_router_logits", True)
    outputs = backbone_of(model)(**inputs)
    hidden = outputs.last_hidden_state  # [B, L, H]
    weight, arguments = head_arguments(model)
    hidden = hidden.to(weight.device)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(weight.device).expand(hidden.shape[:2])
    targets = shift_labels
    if targets is None:
        assert labels is not None
        hidden, targets = hidden[:, :-1], labels[:, 1:]
        if isinstance(temperature, Tensor):
            temperature = temperature[:, :-1]
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1)
    targets = targets.to(weight.device)
    found = linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        temperature=temperature,
        ignore_index=_IGNORED,
        **arguments,
    )
    # FSDP2 hooks what a module returns; an in-place operation on a view would drop the hook.
    logprobs, entropy = (x.view(targets.shape).clone() for x in (found.logprob, found.entropy))
    count: Any = num_items_in_batch
    if count is None:
        count = (targets != _IGNORED).sum().clamp(min=1)  # 0 and not NaN where nothing is labelled
    elif isinstance(count, Tensor):
        count = count.to(logprobs.device)
    loss, balance = -logprobs.sum() / count, None
    if inputs.get("output_router_logits"):
        balance, coefficient = _balance_loss(model, outputs, inputs.get("attention_mask"))
        loss = loss + coefficient * balance
    return FusedLogprobOutput(loss, logprobs, entropy, balance)


def _balance_loss(model: Any, outputs: Any, mask: Tensor | None) -> tuple[Tensor, float]:
    """The load-balancing loss of a mixture of experts, [], and its coefficient in the loss."""
    backbone = backbone_of(model)
    function = getattr(sys.modules[type(backbone).__module__], "load_balancing_loss_func", None)
    names = "num_experts", "num_experts_per_tok", "router_aux_loss_coef"
    settings: list[Any] = [getattr(model, name, None) for name in names]
    if function is None or None in settings:
        reason = f"the auxiliary loss of {type(model).__name__} is not known"
        raise ValueError(f"output_router_logits = True: {reason}; set it to False")
    balance = function(outputs.router_logits, settings[0], settings[1], mask)
    return balance.to(outputs.last_hidden_state.device), settings[2]


@functools.cache
def _fused_class(base: type) -> type:
    """A subclass of a model's class whose forward knows fused_logprobs, under the same name."""

    plain: Any = base.forward  # type: ignore[attr-defined]

    @functools.wraps(plain)  # generate() and Trainer read the signature
    def forward(self: Any, *args: Any, fused_logprobs: bool = False, **kwargs: Any) -> Any:
        if not fused_logprobs:
            return plain(self, *args, **kwargs)
        names = list(inspect.signature(plain).parameters)[1:]
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        inputs.setdefault("temperature", getattr(self, _TEMPERATURE))
        inputs = {name: value for name, value in inputs.items() if value is not None}
        return label_logprobs(self, **inputs)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        return _empty_fused, (base,), self.__getstate__()

    body = {
        "forward": forward,
        "__reduce_ex__": reduce_ex,
        _BASE: base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), body)


def _empty_fused(base: type) -> Any:
    """A fused model without its state, for copy and pickle."""
    cls: Any = _fused_class(base)
    return cls.__new__(cls)


def _check(model: Any) -> None:
    """Raise ValueError unless the head by `head_arguments` gives the model's own logits."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        error = relative_error(*compare_logits(model))
    finally:
        for module, mode in modes.items():
            module.training = mode
    # Logits in half precision carry its rounding.
    half = head_arguments(model)[0].dtype in (torch.bfloat16, torch.float16)
    if not error < (0.05 if half else 1e-3):
        raise ValueError(
            f"{type(model).__name__}: its logits are not those of its head as its config describes "
            f"it (relative error {error:.2g}); use linear_logprob with arguments of your own"
        )
