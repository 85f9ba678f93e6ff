"""Sums over the samples of a rollout, on all ranks, and the measurement they make."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Columns of the sums of a prompt: of tokens, and the same of tokens of correct samples.
_ENTROPY, _TOKENS, _CORRECT_ENTROPY, _CORRECT_TOKENS = range(4)


class RolloutSums:
    """Entropies of the policy that sampled, by prompt, and rho; of one rollout or several."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clear()

    def clear(self) -> None:
        """Begin with the next rollout."""
        self.by_prompt = torch.zeros(0, 4, device=self.device)  # [P, 4], nats and tokens
        self.rho = torch.zeros(2, device=self.device)  # sum and tokens

    def add_prompts(self, number: int) -> int:
        """Make room for the prompts of a rollout; the index of its first one."""
        first = len(self.by_prompt)
        room = torch.zeros(number, 4, device=self.device)
        self.by_prompt = torch.cat([self.by_prompt, room])
        return first

    @torch.no_grad()
    def add_entropy(self, entropy: Tensor, mask: Tensor, prompt: Tensor, positive: Tensor) -> None:
        """Add samples. entropy, mask: [B, C], nats and 0 or 1. prompt: int [B]. positive: [B]."""
        tokens = mask.sum(-1).float()
        # A masked position may hold anything.
        total = entropy.float().masked_fill(mask == 0, 0).sum(-1)
        columns = torch.stack([total, tokens, total * positive, tokens * positive], 1)
        self.by_prompt.index_add_(0, prompt, columns)

    @torch.no_grad()
    def add_rho(self, rho: Tensor) -> None:
        """Add pi_T / pi of [N] tokens."""
        self.rho += torch.stack([rho.sum(), rho.new_tensor(float(len(rho)))])

    def over_ranks(self, add_up: Callable[[Tensor], Tensor]) -> Sums:
        """The sums of all ranks. add_up: the sum of a tensor over them."""
        both = add_up(torch.cat([self.by_prompt.flatten(), self.rho])).double().cpu()
        return Sums(both[:-2].view(-1, 4), both[-2:])


class Sums:
    """The sums of a rollout over all ranks, float64. by_prompt: [P, 4]. rho: [2]."""

    def __init__(self, by_prompt: Tensor, rho: Tensor) -> None:
        self.by_prompt, self.rho = by_prompt, rho

    @property
    def entropy(self) -> float:
        """Token mean of the entropies, nats; NaN without a token."""
        return _ratio(*self.by_prompt[:, :2].sum(0))

    @property
    def stderr(self) -> float:
        """Its standard error, as `aepo_fast.samples.token_mean` has it; NaN with one prompt."""
        by_prompt = self.by_prompt[self.by_prompt[:, _TOKENS] > 0]
        sums, counts = by_prompt[:, _ENTROPY], by_prompt[:, _TOKENS]
        residuals = sums - self.entropy * counts
        spread = residuals.square().sum() * len(residuals) / (len(residuals) - 1 or math.nan)
        return (spread.sqrt() / counts.sum()).item()

    def metrics(self) -> dict[str, float]:
        """Entropies of correct and of wrong samples, and the mean of rho where it was used."""
        total, correct = self.by_prompt[:, :2].sum(0), self.by_prompt[:, 2:].sum(0)
        found = {"entropy/correct": _ratio(*correct), "entropy/wrong": _ratio(*(total - correct))}
        if self.rho[1] > 0:
            found["aepo/rho_mean"] = _ratio(*self.rho)
        return found


def _ratio(total: Tensor, count: Tensor) -> float:
    return (total / count).item() if count > 0 else math.nan
