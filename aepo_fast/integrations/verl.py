"""AEPO's term in a policy loss of verl's registry (verl 0.9).

verl hands a policy loss log-probs, advantages and masks. It does not hand over what AEPO's term
needs besides: the log-probs at T, which samples are correct, and T. Whoever runs verl's loss gives
them for a micro-batch by `micro_batch`; without them the loss raises.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from aepo_fast.config.errors import require
from aepo_fast.config.method import AepoConfig
from aepo_fast.integrations.terms import FORMS, token_terms
from aepo_fast.method.forms import make_form

_MODULE = "verl.trainer.ppo.core_algos"
_LOSS = "old_log_prob log_prob advantages response_mask loss_agg_mode config rollout_is_weights"
_FUNCTIONS = {
    "register_policy_loss": "name",
    "get_policy_loss_fn": "name",
    "agg_loss": "loss_mat loss_mask loss_agg_mode",
}
# verl's own policy loss that AEPO's term is added to: PPO's clipped surrogate.
_POLICY_LOSS = "vanilla"


@dataclass(frozen=True)
class MicroBatch:
    """What AEPO's term needs besides what verl gives a policy loss.

    temperature: T. positive: [B], 1 for correct samples. second_log_prob: [B, C], at T, of the
    policy, differentiable. old_second_log_prob: [B, C], of the policy that sampled; None in the
    first update after sampling.
    """

    temperature: float
    positive: Tensor
    second_log_prob: Tensor
    old_second_log_prob: Tensor | None = None


_current: ContextVar[MicroBatch | None] = ContextVar("micro_batch", default=None)


@contextmanager
def micro_batch(batch: MicroBatch) -> Iterator[None]:
    """Hand `batch` to the loss of `register` that runs inside."""
    token = _current.set(batch)
    try:
        yield
    finally:
        _current.reset(token)


def register(aepo: AepoConfig, name: str = "aepo") -> None:
    """Put verl's policy loss plus AEPO's term into verl's registry, for policy_loss.loss_mode.

    It has to run in every worker: import the module that calls it by VERL_USE_EXTERNAL_MODULES.
    The term is averaged as verl averages the policy loss, so alpha means what it does in ours.
    Raises ConfigError for a form that verl cannot run, ImportError without verl, and RuntimeError
    where verl's functions take other arguments.
    """
    require(
        aepo.enabled and aepo.form in FORMS,
        "aepo.form",
        aepo.form,
        "cannot run inside verl's policy loss",
        f"Set form = {' or '.join(map(repr, FORMS))}",
    )
    core = importlib.import_module(_MODULE)
    for function, expected in _FUNCTIONS.items():
        _check(f"{_MODULE}.{function}", getattr(core, function, None), expected)
    policy_loss = core.get_policy_loss_fn(_POLICY_LOSS)
    _check(f"the policy loss {_POLICY_LOSS!r}", policy_loss, _LOSS)
    core.register_policy_loss(name)(_loss_with_term(core, policy_loss, aepo))


def _loss_with_term(
    core: ModuleType, policy_loss: Callable[..., Any], aepo: AepoConfig
) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    form = make_form(aepo)

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """verl's policy loss plus alpha times AEPO's term; all tensors [B, C]."""
        batch = _current.get()
        if batch is None:
            raise RuntimeError(
                "verl gives a policy loss neither log-probs at T nor which samples are correct: "
                "run verl's ppo_loss inside aepo_fast.integrations.verl.micro_batch(...)"
            )
        total, metrics = policy_loss(
            old_log_prob=old_log_prob,
            log_prob=log_prob,
            advantages=advantages,
            response_mask=response_mask,
            loss_agg_mode=loss_agg_mode,
            config=config,
            rollout_is_weights=rollout_is_weights,
        )
        learns, old_second = response_mask.bool(), batch.old_second_log_prob
        term, rho = token_terms(
            form,
            logprob=log_prob[learns],
            old_logprob=old_log_prob[learns],
            entropy=torch.zeros_like(log_prob[learns]),  # neither form reads it
            second_logprob=batch.second_log_prob[learns],
            old_second_logprob=None if old_second is None else old_second[learns],
            positive=batch.positive.unsqueeze(1).expand_as(log_prob)[learns],
            temperature=batch.temperature,
            clip=_clip(config),
        )
        if rho is not None:
            metrics["aepo/rho_mean"] = rho.mean().item()
        if term is None:
            return total, metrics
        if rollout_is_weights is not None:
            term = term * rollout_is_weights.expand_as(log_prob)[learns]
        added = core.agg_loss(
            loss_mat=torch.zeros_like(log_prob).masked_scatter(learns, term),
            loss_mask=response_mask,
            loss_agg_mode=loss_agg_mode,
            **config.global_batch_info,
        )
        return total + aepo.alpha * added, metrics

    return loss


def _clip(config: Any) -> tuple[float, float]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    both = config.clip_ratio
    return both if low is None else low, both if high is None else high


def _check(name: str, function: Any, expected: str) -> None:
    if function is None:
        raise RuntimeError(f"{name} is missing: AEPO was tested with verl 0.9.1")
    found, wanted = list(inspect.signature(function).parameters), expected.split()
    if found[: len(wanted)] != wanted:
        raise RuntimeError(
            f"{name} takes ({', '.join(found)}) and not ({', '.join(wanted)}): AEPO was tested "
            "with verl 0.9.1"
        )
