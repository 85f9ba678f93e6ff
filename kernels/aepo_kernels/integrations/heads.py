"""Takes a transformers causal language model apart into its backbone and the head's arguments."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

# Settings that multiply the logits before any cap, and those that divide them.
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISOR = "logits_scaling"
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# These models read a setting otherwise: HyperCLOVA X multiplies by it, MPT does not use it.
_MULTIPLY_BY_DIVISOR = ("hyperclovax",)
_WITHOUT_LOGIT_SCALE = ("mpt",)

# Where torch.compile, DDP and DeepSpeed, and FSDP1 keep what they wrap.
_WRAPPED = "_orig_mod", "module", "_fsdp_wrapped_module"


def head_arguments(model: Any) -> tuple[Tensor, dict[str, Any]]:
    """The weight of a model's head, [V, H], and the keyword arguments that both functions need.

    model: a causal language model of transformers, also wrapped by peft, DDP or torch.compile. The
    arguments are bias, softcap and logit_scale, and with one plain LoRA of peft on the head lora_a,
    lora_b and lora_scale, too. All tensors are the live parameters, so call this at every step
    where the head's adapters may change, and inside the module's forward under FSDP.

    Raises ValueError, with the kind of the head, for a head that is not linear or is quantised,
    sharded or adapted in a way that the kernels do not compute. A setting that this function does
    not know would be missing without a word: `relative_error` tells.
    """
    model = unwrapped(model)
    linear = _own_head(model.get_output_embeddings(), type(model).__name__)
    lora: dict[str, Any] = {}
    if hasattr(linear, "lora_A"):
        linear, lora = _without_lora(linear)
    if not isinstance(linear, nn.Linear):
        kind = type(linear).__name__
        if hasattr(linear, "base_layer"):  # peft's names are those of what it wraps
            kind = f"{type(linear).__module__}.{kind}"
        raise ValueError(f"{type(model).__name__} has no linear head but {kind}")
    weight = linear.weight
    if not weight.is_floating_point():
        raise ValueError(
            f"{type(linear).__name__}: its weight is quantised to {weight.dtype}; keep the head in "
            "bfloat16 or float32"
        )
    if weight.ndim != 2 or weight.shape[1] != linear.in_features:
        raise ValueError(
            f"{type(linear).__name__}: its weight is {tuple(weight.shape)} and not "
            f"[V, {linear.in_features}]: a part, as of ZeRO-3; gather it around the call"
        )
    scale, softcap = logit_settings(model.config)
    return weight, {"bias": linear.bias, "softcap": softcap, "logit_scale": scale, **lora}


def backbone_of(model: Any) -> Any:
    """The model without its head: returns last_hidden_state, [B, L, H]."""
    model = unwrapped(model)
    backbone = model.base_model
    if backbone is model:  # one whose prefix is that of a larger model, as Llama 4's
        backbone = getattr(model, "model", model)
    if backbone is model:
        raise ValueError(f"{type(model).__name__} has no backbone apart from its head")
    return backbone


def unwrapped(model: Any) -> Any:
    """The transformers model inside DDP, FSDP, DeepSpeed, torch.compile or peft's PeftModel.

    Raises ValueError for what is no model with an output embedding.
    """
    # Wrappers hand attributes through, so what counts is the class.
    while not hasattr(type(model), "get_output_embeddings"):
        parts = getattr(model, "_modules", {})
        inner = [parts[name] for name in _WRAPPED if isinstance(parts.get(name), nn.Module)]
        if inner:
            model = inner[0]
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            reason = "is no transformers model: it has no get_output_embeddings()"
            raise ValueError(f"{type(model).__name__} {reason}; pass weight and settings by hand")
    return model


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
) -> Tensor:
    """All logits of a head, [..., V] in float32 or wider, as `linear_logprob` defines them.

    hidden: [..., H]. weight and LoRA are rounded to its dtype first, as the kernels do.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    states = hidden.to(wide)
    logits = states @ weight.to(hidden.dtype).to(wide).T
    if lora_a is not None and lora_b is not None:
        narrow = [part.to(hidden.dtype).to(wide) for part in (lora_a, lora_b)]
        logits += lora_scale * (states @ narrow[0].T @ narrow[1].T)
    if bias is not None:
        logits += bias.to(wide)
    logits *= logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


@torch.no_grad()
def compare_logits(
    model: Any, autocast: AbstractContextManager[Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Logits of four tokens by `head_arguments` and by the model itself, both [1, 4, V], float32.

    autocast: the context that both forward passes run in. Runs the model twice in its present mode;
    dropout would make the two differ.
    """
    ids = torch.arange(4, device=model.device)[None]
    weight, arguments = head_arguments(model)
    with autocast or nullcontext():
        expected = model(input_ids=ids, use_cache=False).logits.float()
        hidden = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    with torch.autocast(hidden.device.type, enabled=False):
        return head_logits(hidden, weight, **arguments).float(), expected


def relative_error(logits: Tensor, expected: Tensor) -> float:
    """|logits - expected| / |expected|, in the 2-norm over all elements; NaN where one is."""
    return ((logits - expected).norm() / expected.norm()).item()


def logit_settings(config: Any) -> tuple[float, float | None]:
    """The factor of the logits and their softcap, or None, of a transformers config."""
    settings = config.get_text_config().to_dict()
    scale, kind = 1.0, settings.get("model_type")
    for name in _FACTORS:
        unused = name == "logit_scale" and kind in _WITHOUT_LOGIT_SCALE
        if not unused and settings.get(name) is not None:
            scale *= float(settings[name])
    if settings.get(_DIVISOR):
        divisor = settings[_DIVISOR]
        scale = scale * divisor if kind in _MULTIPLY_BY_DIVISOR else scale / divisor
    caps = [settings[name] for name in _CAPS if settings.get(name) is not None]
    return scale, caps[0] if caps else None


def _own_head(head: Any, model: str) -> Any:
    """The module that runs: the copy that peft trains whole, where there is one."""
    if head is None:
        raise ValueError(f"{model} has no linear head but NoneType")
    copies = getattr(head, "modules_to_save", None)
    if copies is None:
        return head
    names = [name for name in _active(head) if name in copies]
    if getattr(head, "disable_adapters", False) or not names:
        return head.original_module
    if len(names) > 1:
        raise ValueError(f"{type(head).__name__}: {len(names)} active adapters; activate one")
    return copies[names[0]]


def _without_lora(layer: Any) -> tuple[Any, dict[str, Any]]:
    """The base layer of peft's LoRA and the arguments for its adapter, none where it is off."""
    kind, base = type(layer).__name__, layer.base_layer
    names = [name for name in _active(layer) if name in layer.lora_A]
    if layer.disable_adapters and layer.merged:
        raise ValueError(f"{kind}: its adapter is off but still merged; call unmerge_adapter()")
    if layer.disable_adapters or layer.merged or not names:
        return base, {}
    if len(names) > 1:
        reason = "is the sum of several and the kernels have one"
        raise ValueError(f"{kind} {names}: {reason}; merge them or activate one")
    (name,) = names
    variant = layer.lora_variant.get(name) if hasattr(layer, "lora_variant") else None
    if variant is not None or getattr(layer, "use_dora", {}).get(name):
        found = getattr(variant, "__name__", None) or type(variant).__name__
        what = "DoRA" if layer.use_dora.get(name) else found
        reason = "is no plain low-rank sum; train lm_head with plain LoRA, or leave it out"
        raise ValueError(f"{kind} {name!r}: {what} {reason}")
    dropout = layer.lora_dropout[name]
    if layer.training and getattr(dropout, "p", 0.0) > 0:
        reason = f"lora_dropout {dropout.p} would be left out; set it to 0, or call eval()"
        raise ValueError(f"{kind} {name!r}: {reason}")
    lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
    if lora_b.bias is not None:
        raise ValueError(f"{kind} {name!r}: its lora_B has a bias; set lora_bias=False")
    return base, {
        "lora_a": lora_a.weight,
        "lora_b": lora_b.weight,
        "lora_scale": float(layer.scaling[name]),
    }


def _active(layer: Any) -> list[str]:
    """The names of a peft layer's active adapters."""
    active = layer.active_adapters if hasattr(layer, "active_adapters") else layer.active_adapter
    return [active] if isinstance(active, str) else list(active)
