"""Entropy regularisers a researcher compares AEPO with, on token vectors.

Those that look at a whole batch return a mask computed before the update; the rest are
elementwise. Entropies are in nats at temperature 1.
"""

from __future__ import annotations

import math

import torch

from aepo_fast.config.method import LossConfig


class BonusCoefficient:
    """Coefficient of the entropy bonus; "adaptive_bonus" moves it towards a target entropy.

    Skywork-OR1 (arXiv 2505.22312): up by `adaptive_delta` while the entropy is below
    `adaptive_target`, down by it otherwise, never below 0, and applied only while below.
    """

    def __init__(self, cfg: LossConfig) -> None:
        self.cfg = cfg
        self.coef = cfg.entropy_coef
        self.entropy: float | None = None

    @property
    def value(self) -> float:
        """The coefficient to use in the coming step."""
        if self.cfg.entropy_method == "bonus":
            return self.coef
        below = self.entropy is not None and self.entropy < self.cfg.adaptive_target
        return self.coef if self.cfg.entropy_method == "adaptive_bonus" and below else 0.0

    def update(self, entropy: float) -> None:
        """Take in the entropy of a step; one that is not finite is not a measurement."""
        if not math.isfinite(entropy):
            return
        self.entropy = entropy
        if self.cfg.entropy_method == "adaptive_bonus":
            sign = 1.0 if entropy < self.cfg.adaptive_target else -1.0
            self.coef = max(0.0, self.coef + sign * self.cfg.adaptive_delta)

    def state_dict(self) -> dict[str, float | None]:
        """What a checkpoint needs: a coefficient only where it is no setting."""
        adapted = self.cfg.entropy_method == "adaptive_bonus"
        return {"coef": self.coef if adapted else None, "entropy": self.entropy}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Go on from a saved state; a constant coefficient is the configured one."""
        self.entropy = state["entropy"]
        if self.cfg.entropy_method == "adaptive_bonus" and state["coef"] is not None:
            self.coef = state["coef"]


def entropy_advantage(
    advantage: torch.Tensor, entropy: torch.Tensor, *, coef: float, kappa: float
) -> torch.Tensor:
    """A + min(coef * sg(H), |A| / kappa), [N]: never flips the sign of A (arXiv 2506.14758)."""
    return advantage + torch.minimum(coef * entropy.detach(), advantage.abs() / kappa)


def top_entropy_mask(entropy: torch.Tensor, fraction: float) -> torch.Tensor:
    """Bool [N]: the `fraction` of tokens of highest entropy, at least one (80/20, 2506.01939)."""
    chosen = torch.zeros_like(entropy, dtype=torch.bool)
    if len(entropy):
        chosen[entropy.topk(max(1, round(fraction * len(entropy)))).indices] = True
    return chosen


def covariance(logprob: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """Each token's share of cov(log pi, A): (log pi - mean)(A - mean), [N] (2505.22617)."""
    return (logprob - logprob.mean()) * (advantage - advantage.mean())


def clip_cov_mask(
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    *,
    fraction: float,
    low: float,
    high: float,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Bool [N]: tokens that lose their gradient under Clip-Cov (arXiv 2505.22617).

    `fraction` of all tokens, drawn at random from those whose covariance lies in (low, high).
    """
    chosen = torch.zeros_like(logprob, dtype=torch.bool)
    if len(logprob):
        value = covariance(logprob, advantage)
        candidates = ((value > low) & (value < high)).nonzero().flatten()
        order = torch.randperm(len(candidates), generator=generator).to(candidates.device)
        chosen[candidates[order[: max(1, round(fraction * len(logprob)))]]] = True
    return chosen


def kl_cov_mask(logprob: torch.Tensor, advantage: torch.Tensor, *, fraction: float) -> torch.Tensor:
    """Bool [N]: the `fraction` of tokens of highest covariance, penalised by KL-Cov (2505.22617).

    Their loss gains kl_cov_coef * |log pi - log pi_old|.
    """
    return top_entropy_mask(covariance(logprob, advantage), fraction)
