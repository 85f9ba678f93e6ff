"""What a head's log-probs, entropies and gradients are, in float64 from all logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from aepo_kernels.integrations.tiny_models import VOCAB, tiny_model


class Scores(NamedTuple):
    """Log-probs and entropies, [B, L - 1], and the gradient of their weighted sum by parameter."""

    logprob: Tensor
    entropy: Tensor
    grads: list[Tensor]


def token_ids(rows: int = 2, length: int = 9) -> Tensor:
    """Random ids [rows, length], the same at every call."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


def differentiate(model: Any, logprob: Tensor, entropy: Tensor) -> Scores:
    """The scores with the gradient of a loss that weights every token differently."""
    upstream = torch.linspace(-1, 1, logprob.numel(), dtype=logprob.dtype).view_as(logprob)
    loss = (upstream * logprob).sum() + 0.3 * (upstream.flip(0) * entropy).sum()
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)
    ]
    return Scores(logprob.detach(), entropy.detach(), found)


def truth(name: str, ids: Tensor, temperature: float = 1.0) -> Scores:
    """The scores of a tiny model in float64, by its own logits."""
    model = tiny_model(name, dtype=torch.float64)
    logits = model(input_ids=ids).logits[:, :-1] / temperature
    logprobs = torch.log_softmax(logits, -1)
    logprob = logprobs.gather(2, ids[:, 1:, None])[..., 0]
    return differentiate(model, logprob, -(logprobs.exp() * logprobs).sum(-1))


def errors(found: Scores, expected: Scores) -> tuple[float, float, float]:
    """Largest errors of log-probs and entropies, and that of gradients over the largest one."""
    logprob = (found.logprob.double() - expected.logprob).abs().max().item()
    entropy = (found.entropy.double() - expected.entropy).abs().max().item()
    size = max(grad.abs().max().item() for grad in expected.grads)
    pairs = zip(found.grads, expected.grads, strict=True)
    grad = max((left.double() - right).abs().max().item() for left, right in pairs)
    return logprob, entropy, grad / size
