"""A policy loss by its name: one of the table, or the user's "module:function", checked.

The signature is checked before any model loads. What the function returns is checked when the run
first evaluates it: its shape, its gradient, and that it is a sum over tokens or over samples,
without which the loss would depend on how the trainer splits a minibatch.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch

from aepo_fast.config.errors import ConfigError, suggest
from aepo_fast.config.user_code import import_function
from aepo_fast.method.policy_losses import (
    GIVEN,
    POLICY_LOSSES,
    LossFunction,
    PolicyLoss,
    TokenTerms,
)
from aepo_kernels.loss_checks import worst_difference


def find_policy_loss(name: str) -> PolicyLoss:
    """The policy loss that `loss.policy` names; raises ConfigError if there is none."""
    if name in POLICY_LOSSES:
        return POLICY_LOSSES[name]
    if name.count(":") != 1:
        fix = f'{suggest(name, POLICY_LOSSES)}, or write "my_module:my_loss" for one of your own'
        raise ConfigError("loss.policy", name, "is not one of its values", fix)
    function = import_function("loss.policy", name)
    _check_signature(name, function)
    return PolicyLoss(name, _checked(name, function), needs_advantage=False)


def _check_signature(name: str, function: LossFunction) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        fix = "Name a plain function"
        raise ConfigError("loss.policy", name, f"has no signature: {error}", fix) from error
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for parameter in parameters:
        if parameter.kind not in by_name:
            reason = f"takes {str(parameter)!r}, and arguments are given by name"
            fix = "Name each argument that the loss wants"
            raise ConfigError("loss.policy", name, reason, fix)
    if "logprob" not in {parameter.name for parameter in parameters}:
        reason = "takes no 'logprob', so its loss cannot have a gradient"
        raise ConfigError("loss.policy", name, reason, "Name logprob among its arguments")


def check_params(loss: PolicyLoss, params: Mapping[str, Any]) -> None:
    """Raise ConfigError where `[loss.params]` sets too much for a loss or too little."""
    own = loss.own_arguments
    for name, value in params.items() if own else ():  # else the whole table does nothing
        if name not in own:
            reason = f"the function of loss.policy = {loss.name!r} takes no such argument"
            fix = suggest(name, own)
            if name in GIVEN:
                reason, fix = "is given by the trainer", "Leave it out"
            raise ConfigError(f"loss.params.{name}", value, reason, fix)
    for name in own:
        if name in params or loss.parameters[name].default is not inspect.Parameter.empty:
            continue
        near = difflib.get_close_matches(name, GIVEN, n=1)
        given = f"Did you mean {near[0]}, or set" if near else "Set"
        raise ConfigError(
            "loss.policy",
            loss.name,
            f"takes {name!r}, which is neither given by the trainer nor set",
            f"{given} loss.params.{name}; the trainer gives {', '.join(GIVEN)}",
        )
    if params and own and loss.name in POLICY_LOSSES:
        _check_values(loss, params)


def _check_values(loss: PolicyLoss, params: Mapping[str, Any]) -> None:
    """Raise ConfigError where a loss of the table cannot be computed with the params' values."""
    tokens = torch.zeros(8)
    given: dict[str, Any] = dict.fromkeys(GIVEN, tokens) | {
        "clip_low": loss.clip_low,
        "clip_high": loss.clip_high,
        "dual_clip": 3.0,
        "sample_of_token": torch.arange(8) // 2,
    }
    try:
        value = loss.terms(_on_ramps(given)[0], params).loss
        reason = "" if bool(value.isfinite().all()) else "gives a loss that is not finite"
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = f"gives no loss: {type(error).__name__}: {error}"
    if reason:
        fix = f"Leave {', '.join(loss.own_arguments)} out, or give numbers near the defaults"
        raise ConfigError("loss.params", dict(params), f"{loss.name} {reason}", fix)


def _checked(name: str, function: LossFunction) -> LossFunction:
    """`function`, its results' shapes checked always, its gradient and its additivity once."""
    done = False

    @wraps(function)
    def call(**arguments: Any) -> torch.Tensor | TokenTerms:
        nonlocal done
        if not done:
            done = _check_on_ramps(name, function, arguments)
        result = function(**arguments)
        _check_result(name, result, arguments)
        return result

    return call


def _check_on_ramps(name: str, function: LossFunction, arguments: Mapping[str, Any]) -> bool:
    """Check gradient and additivity; False with too few tokens or samples for the latter.

    The arguments' values are replaced: at the first update all ratios are 1, and a mean of them
    would differ from none of them.
    """
    ramps, units = _on_ramps(arguments)
    with torch.enable_grad():
        result = function(**ramps)
        _check_result(name, result, ramps)
        loss = _loss(result)
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss.sum(), ramps["logprob"], allow_unused=True)
    if gradient is None:
        reason = "returned a loss that has no gradient by logprob"
        raise ConfigError("loss.policy", name, reason, "Compute it from logprob, not detached")
    if not bool(loss.isfinite().all()):
        reason = "returned a loss that is not finite for log-probs between -3 and -0.3"
        raise ConfigError("loss.policy", name, reason, "Bound what it divides by or takes exp of")
    if len(loss) < 2:
        return False
    half = len(loss) // 2
    with torch.no_grad():
        halves = [
            _loss(function(**_part(ramps, units < half, 0))),
            _loss(function(**_part(ramps, units >= half, half))),
        ]
    _check_additive(name, loss.detach(), halves, "row" if "sample_of_token" in ramps else "token")
    return True


def _on_ramps(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """The arguments with values that rise along the chunk, and the token or sample of each, [N].

    Ratios run from exp(0.4) to exp(-0.4), advantages, which are equal along a sample, from -0.5 to
    1.5, so that a mean over one half differs from that over the whole.
    """
    logprob = arguments["logprob"]
    units = arguments.get("sample_of_token")
    if units is None:
        units = torch.arange(len(logprob), device=logprob.device)
    rise = torch.linspace(0, 1, len(logprob), dtype=logprob.dtype, device=logprob.device)
    step = units.to(rise.dtype) / units.max().clamp(min=1) if len(units) else rise
    ramp = -0.3 - 2.7 * rise
    values = {
        "logprob": ramp.clone().requires_grad_(),
        "old_logprob": ramp + 0.8 * rise - 0.4,
        "advantage": 2 * step - 0.5,
        "entropy": 0.2 + 2 * rise,
        "second_logprob": 0.8 * ramp,
    }
    replaced = {
        name: values[name] if name in values and value is not None else value
        for name, value in arguments.items()
    }
    return replaced, units


def _part(arguments: Mapping[str, Any], chosen: torch.Tensor, first_sample: int) -> dict[str, Any]:
    """The arguments of the chosen tokens, whose samples are counted from `first_sample`."""
    part = {
        name: value.detach()[chosen] if isinstance(value, torch.Tensor) and name in GIVEN else value
        for name, value in arguments.items()
    }
    if "sample_of_token" in part:
        part["sample_of_token"] = part["sample_of_token"] - first_sample
    return part


def _check_additive(name: str, loss: torch.Tensor, halves: list[torch.Tensor], unit: str) -> None:
    parts = torch.cat(halves)
    if len(parts) != len(loss):
        reason = f"returned {len(parts)} values for the {len(loss)} {unit}s of two halves"
        raise ConfigError("loss.policy", name, reason, f"Return one value per {unit}")
    # A mean over the chunk differs by far more than roundings, since the probe's values rise from
    # one half to the other.
    worst = worst_difference(loss, parts, least=1.0)
    if worst is None:
        return
    fix = "Use nothing of other tokens; a loss over whole sequences must take sample_of_token"
    if unit == "row":
        fix = "Use nothing of other rows"
    raise ConfigError(
        "loss.policy",
        name,
        f"is not additive over {unit}s: {unit} {worst} of {len(loss)} has the loss "
        f"{float(loss[worst]):.6g} beside all {unit}s and {float(parts[worst]):.6g} beside those "
        "of its half",
        fix,
    )


def _loss(result: torch.Tensor | TokenTerms) -> torch.Tensor:
    return result.loss if isinstance(result, TokenTerms) else result


def _check_result(name: str, result: object, arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError unless it is one value per token or sample, in the dtype of logprob."""
    logprob, sample_of_token = arguments["logprob"], arguments.get("sample_of_token")
    shape = logprob.shape if sample_of_token is None else (int(sample_of_token[-1]) + 1,)
    unit = "token" if sample_of_token is None else "row"
    for tensor in result if isinstance(result, TokenTerms) else (result,):
        if not isinstance(tensor, torch.Tensor):
            reason = f"returned a value of type {type(tensor).__name__}"
            fix = "Return a tensor, or aepo_fast.method.policy_losses.TokenTerms"
            raise ConfigError("loss.policy", name, reason, fix)
        if tensor.shape != shape:
            reason = f"returned the shape {list(tensor.shape)} where {list(shape)} is needed"
            fix = f"Return one value per {unit}, neither summed nor averaged"
            raise ConfigError("loss.policy", name, reason, fix)
    loss = result.loss if isinstance(result, TokenTerms) else result
    assert isinstance(loss, torch.Tensor)
    if loss.dtype != logprob.dtype:
        reason = f"returned {loss.dtype} where logprob is {logprob.dtype}"
        raise ConfigError("loss.policy", name, reason, "Compute it in the dtype of logprob")
