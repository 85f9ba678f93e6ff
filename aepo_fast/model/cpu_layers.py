"""The C++ operations of `aepo_kernels.cpu.layers` inside a transformers model on a CPU.

A model's norms, SwiGLUs and rotary embeddings are recognised by what they compute: each kind of
module is tried on a few numbers first, and stays as it is where the results differ.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aepo_kernels.cpu import layers

_ROTARY = "apply_rotary_pos_emb"  # what transformers' attention modules call
_KIND = "fused_kind"


def fuse_layers(
    model: PreTrainedModel, tried: Callable[[nn.Module], nn.Module] = lambda module: module
) -> None:
    """Let a model's layers use the C++ operations, by way of subclasses of what they are.

    model: on a machine that `runs_cpp`. Under autocast norms of float32, as of the residual stream,
    give its dtype: the GEMMs behind them would cast to it. tried: gives the module of a model
    without numbers some, to be tried in its place.
    """
    classes: dict[type, type] = {}
    for module in list(model.modules()):
        # Each by itself: a class may compute something else in some of its layers.
        plain, own = type(module), _own(tried(module))
        if own is None:
            continue
        if plain not in classes:
            members = {**own, "__module__": plain.__module__}
            classes[plain] = type(plain.__name__, (plain,), members)
        module.__class__ = classes[plain]


def with_numbers(module: nn.Module) -> nn.Module:
    """A small module of the same class and settings, with numbers, to try what it computes."""
    small = copy.copy(module)
    small._modules = {name: _small(child) for name, child in module._modules.items()}
    small._parameters = {
        name: None if one is None else _numbers_like(one)
        for name, one in module._parameters.items()
    }
    return small


def _small(child: nn.Module | None) -> nn.Module | None:
    if not isinstance(child, nn.Linear):
        return child
    up = child.out_features > child.in_features
    sizes = (8, 16) if up else (16, 8)
    return nn.Linear(*sizes, bias=child.bias is not None, dtype=child.weight.dtype)


def _numbers_like(parameter: Tensor) -> nn.Parameter:
    if parameter.ndim > 1:  # not of a module that is tried whole
        return nn.Parameter(torch.zeros(1, dtype=parameter.dtype))
    numbers = torch.linspace(0.5, 1.5, parameter.numel()).to(parameter.dtype)
    return nn.Parameter(numbers)


def fused_kinds(model: PreTrainedModel) -> list[str]:
    """What of a model runs in C++: any of "norm", "rotary", "swiglu"."""
    kinds = {getattr(type(module), _KIND, None) for module in model.modules()}
    return sorted(kind for kind in kinds if kind is not None)


@torch.no_grad()
def _own(module: nn.Module) -> dict[str, Any] | None:
    """The members of a module's new class, its kind and `forward`; None where it keeps its own."""
    if _computes(_is_norm, module):
        return {_KIND: "norm", "forward": _norm}
    if _computes(_is_swiglu, module):
        return {_KIND: "swiglu", "forward": _swiglu}
    forward = type(module).forward
    if isinstance(forward, FunctionType) and _ROTARY in forward.__code__.co_names:
        rotary = forward.__globals__.get(_ROTARY)
        if rotary is not None and _computes(_is_rotary, rotary):
            return {_KIND: "rotary", "forward": _with_rotary(forward, rotary)}
    return None


def _computes(tried: Callable[[Any], bool], part: Any) -> bool:
    try:
        return tried(part)
    except Exception:  # of a layer that takes or holds something else: it stays as it is
        return False


def _is_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return False
    if not isinstance(weight, Tensor) or weight.ndim != 1:
        return False
    x = _numbers(3, len(weight)).to(weight.dtype)
    return _close(module(x), _norm(module, x))


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    dtype = torch.promote_types(self.weight.dtype, hidden_states.dtype)
    if hidden_states.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    return layers.rms_norm(hidden_states, self.weight, self.variance_epsilon, dtype)


def _is_swiglu(module: Any) -> bool:
    names = {name for name, _ in module.named_children()}
    if names != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    gate = module.gate_proj
    dtype = gate.weight.dtype if gate.weight.is_floating_point() else torch.float32  # of 4 bits
    x = _numbers(3, gate.in_features).to(dtype)
    # Some cut off what is large.
    return all(_close(module(size * x), _swiglu(module, size * x)) for size in (1, 1000))


def _swiglu(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(layers.swiglu(self.gate_proj(x), self.up_proj(x)))


def _is_rotary(rotary: Callable[..., Any]) -> bool:
    query, key = _numbers(2, 3, 4, 8), _numbers(2, 1, 4, 8)
    angles = _numbers(2, 4, 4).repeat(1, 1, 2)
    truth = rotary(query, key, angles.cos(), angles.sin())
    found = _rotary(rotary, query, key, angles.cos(), angles.sin())
    return all(_close(a, b) for a, b in zip(truth, found, strict=True))


def _rotary(
    plain: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    if options or cos.shape[1:] != q.shape[2:]:
        return plain(q, k, cos, sin, **options)
    return layers.rotary(q, cos, sin), layers.rotary(k, cos, sin)


def _with_rotary(forward: FunctionType, rotary: Callable[..., Any]) -> FunctionType:
    """A copy of an attention's `forward` that calls ours; the original's module is left alone."""
    names = {**forward.__globals__, _ROTARY: functools.partial(_rotary, rotary)}
    copy = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _close(truth: Tensor, found: Tensor) -> bool:
    if truth.shape != found.shape or truth.dtype != found.dtype:
        return False
    error = 1e-4 if truth.dtype == torch.float32 else 0.02
    return torch.allclose(truth, found, rtol=error, atol=error * float(truth.abs().max()))
