"""The routers of a mixture of experts: frozen, or trained with a loss that balances the experts."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import ModelConfig

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_BALANCING_LOSS = "load_balancing_loss_func"


def has_experts(config: PretrainedConfig) -> bool:
    """Whether the layers of a model are a mixture of experts."""
    text = config.get_text_config()
    return any((getattr(text, name, None) or 0) > 1 for name in _COUNTS)


def check_routers(cfg: ModelConfig, config: PretrainedConfig) -> None:
    """Raise ConfigError for a model without routers, or without a loss that balances experts."""
    for key, value in (
        ("freeze_router", cfg.freeze_router),
        ("router_aux_loss_coef", cfg.router_aux_loss_coef),
    ):
        if value and not has_experts(config):
            reason = f"{config.model_type} has no experts, and so no router"
            raise ConfigError(f"model.{key}", value, reason, "Leave it out")
    if cfg.router_aux_loss_coef and _balancing_loss(config) is None:
        reason = f"transformers has no loss that balances the experts of {config.model_type}"
        fix = "Leave it out, or set model.freeze_router = true"
        raise ConfigError("model.router_aux_loss_coef", cfg.router_aux_loss_coef, reason, fix)


def freeze_routers(model: PreTrainedModel) -> None:
    """Let no gradient reach a model's routers; raises ConfigError where they cannot be found."""
    kind = _router_class(model)
    found = [] if kind is None else [one for one in model.modules() if isinstance(one, kind)]
    if not found:
        reason = f"the routers of {type(model).__name__} cannot be told apart from its experts"
        raise ConfigError("model.freeze_router", True, reason, "Leave it out")
    for router in found:
        router.requires_grad_(False)


def balancing_loss(
    model: PreTrainedModel, router_logits: tuple[Tensor, ...], valid: Tensor | None
) -> Tensor:
    """The loss that balances a model's experts, as transformers computes it: [], float32.

    router_logits: of each layer, [B * L, experts]. valid: [B, L], 0 for padding; None where there
    is none. E sum_e f_e P_e, where f_e counts the tokens of an expert and P_e is the mean of its
    probability (arXiv 2101.03961, equations 4 to 6), over the tokens of all layers.
    """
    loss: Any = _balancing_loss(model.config)
    own: Any = model
    logits = tuple(layer.float() for layer in router_logits)
    return loss(logits, own.num_experts, own.num_experts_per_tok, valid)


class _WithLoss(torch.autograd.Function):
    """Hands states through; the backward pass also takes a loss's gradient, with weight 1."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, loss: Tensor) -> Tensor:
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, grad.new_ones((), dtype=torch.float32)


def with_loss(states: Tensor, loss: Tensor) -> Tensor:
    """The same states. A backward pass of any loss of them adds the gradient of `loss`."""
    result: Any = _WithLoss.apply(states, loss)
    return result


def _balancing_loss(config: PretrainedConfig) -> Any:
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)  # type: ignore[attr-defined]
    if kind is None:
        return None
    kind = kind[0] if isinstance(kind, tuple) else kind
    return getattr(sys.modules[kind.__module__], _BALANCING_LOSS, None)


def _router_class(model: PreTrainedModel) -> type[nn.Module] | None:
    """The class whose outputs transformers records as a model's router logits."""
    for part in model.modules():
        recorders = getattr(part, "_can_record_outputs", None) or {}
        recorder = recorders.get("router_logits")
        kind = getattr(recorder, "target_class", recorder)
        # Some record what a whole block of experts returns.
        if isinstance(kind, type) and ("Router" in kind.__name__ or "Gate" in kind.__name__):
            return kind
    return None
