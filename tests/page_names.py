"""What python blocks of README and docs find: a tiny model, a batch, a user's functions."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch

from aepo_kernels.integrations.tiny_models import VOCAB, tiny_model


class Block(NamedTuple):
    """A code block of a page. needs: the package that ```python needs NAME asks for, or ""."""

    language: str
    needs: str
    text: str


def blocks(page: str) -> list[Block]:
    """The code blocks of a page in their order."""
    found = re.findall(r"^```(\w*)(?: needs (\w+))?\n(.*?)^```$", page, flags=re.M | re.S)
    return [Block(*block) for block in found]


def mean_reward(completions: list[Any], **_: Any) -> list[float]:
    """A reward in TRL's form."""
    return [float(len(str(completion)) % 7) for completion in completions]


def policy_loss(logprob: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
    """A loss of one column, old log-probs."""
    old = rest[-1]
    assert old is not None
    return -(logprob - old).exp().sum()


def names() -> dict[str, Any]:
    """A new namespace: two sequences of 8 tokens, 14 of which follow another, and a model."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    input_ids = torch.randint(3, VOCAB, (2, 8), generator=generator)
    return {
        "model": tiny_model("gemma2"),
        "input_ids": input_ids,
        "labels": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "loss_mask": torch.arange(7).expand(2, 7) > 2,
        "temperature": 0.7,
        "hidden": random(14, 32).requires_grad_(),
        "weight": random(VOCAB, 32).requires_grad_(),
        "targets": torch.randint(VOCAB, (14,), generator=generator),
        "old_logprob": -random(14).abs() - 3,
        "advantage": random(14),
        "advantages": random(2),
        "token_weight": torch.full((14,), 1 / 14),
        "policy_loss": policy_loss,
        "reward": mean_reward,
    }
