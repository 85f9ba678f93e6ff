"""The kernels against plain torch on the device at hand, for versions that no test has seen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aepo_kernels.api import linear_token_loss

_TOKENS, _HIDDEN, _VOCAB = 33, 64, 1003  # no multiple of any block
_TIMES, _LEAST = 2.0, 1e-5  # what a rewrite of sums needs, and where rounding vanishes


class _Case(NamedTuple):
    """hidden [N, H], weight [V, H], targets [N], factor [N] of the loss."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    factor: Tensor


def difference(device: torch.device, dtype: torch.dtype, backend: str = "auto") -> str | None:
    """What of a loss and its gradients is wrong on a device; None where all is right.

    dtype: of the GEMMs. An error against float64 is right up to twice the error of torch's own
    operations on materialised logits in `dtype`. Takes milliseconds on a CPU; on a GPU Triton
    compiles its kernels first. No random state changes.
    """
    case = _case(device, dtype)
    exact = _materialised(_in(case, torch.float64))
    plain = _materialised(_in(case, dtype))
    ours = _ours(_in(case, dtype), backend)
    for name, truth in exact.items():
        error, allowed = (((x[name] - truth).norm() / truth.norm()).item() for x in (ours, plain))
        limit = _TIMES * allowed + _LEAST
        if not error <= limit:
            return f"{name} is wrong by {error:.2g}, where rounding explains {limit:.2g}"
    return None


def _case(device: torch.device, dtype: torch.dtype) -> _Case:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(_TOKENS, _HIDDEN, generator=rng)
    weight = torch.randn(_VOCAB, _HIDDEN, generator=rng) * 2 * _HIDDEN**-0.5
    targets = torch.randint(_VOCAB, (_TOKENS,), generator=rng)
    factor = torch.randn(_TOKENS, generator=rng)
    case = _Case(hidden.to(dtype), weight.to(dtype), targets, factor)
    return _Case._make(tensor.to(device) for tensor in case)


def _in(case: _Case, dtype: torch.dtype) -> _Case:
    hidden, weight = (x.detach().to(dtype, copy=True).requires_grad_() for x in case[:2])
    return case._replace(hidden=hidden, weight=weight)


def _loss(logprob: Tensor, entropy: Tensor, second: Tensor | None, factor: Tensor) -> Tensor:
    return -(logprob.clamp(min=-6) * factor).sum() - 0.3 * entropy.sum()


@torch.enable_grad()
def _ours(case: _Case, backend: str) -> dict[str, Tensor]:
    out = linear_token_loss(
        case.hidden,
        case.weight,
        case.targets,
        _loss,
        case.factor,
        backend=backend,
        check_loss=False,
    )
    out.loss.backward()
    return _results(case, out.logprob, out.entropy)


@torch.enable_grad()
def _materialised(case: _Case) -> dict[str, Tensor]:
    logits = case.hidden @ case.weight.T  # [N, V]
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    logprob = logprobs.gather(1, case.targets[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    _loss(logprob, entropy, None, case.factor).backward()
    return _results(case, logprob, entropy)


def _results(case: _Case, logprob: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    assert case.hidden.grad is not None and case.weight.grad is not None
    found = {
        "the log-prob": logprob.detach(),
        "the entropy": entropy.detach(),
        "the gradient by hidden states": case.hidden.grad,
        "the gradient by the weight": case.weight.grad,
    }
    return {name: value.double() for name, value in found.items()}
