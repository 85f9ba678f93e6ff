"""Entropy regularisers a researcher compares AEPO with: their hooks into the loss and formulas.

`loss.entropy_method` names one; `rivals` holds five more and the table of all. Those that look at a
whole batch return a mask computed before the update; the rest are elementwise. Entropies are in
nats at temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aepo_fast.config.method import LossConfig
from aepo_fast.method.tokens import Columns, Tokens
from aepo_fast.samples import Sample, TokenValues


class Regulariser:
    """What an entropy method changes in the loss and in its coefficients: by itself nothing."""

    needs_old_logprobs = False  # log-probs and entropies of whole samples before the first update
    all_samples_active = False  # its gradient also reaches samples whose advantage is 0
    adapts_bonus = False  # the bonus's coefficient is no setting

    def __init__(self, loss: LossConfig) -> None:
        self.loss = loss

    def second_temperature(self) -> float | None:
        """The temperature of the second log-prob that it takes, None where it takes none."""
        return None

    def sample_columns(
        self, samples: Sequence[Sample], per_sample: Columns, old: TokenValues | None
    ) -> Columns:
        """Per-sample columns that it changes or adds, [R] each.

        per_sample: advantage, main and positive of the minibatch, which holds whole groups. old:
        of the policy that sampled, there with `needs_old_logprobs`.
        """
        return {}

    def select(
        self,
        old: TokenValues,
        advantage: torch.Tensor,
        main: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor | None:
        """Bool, one per main token: those it acts on (the column `selected`), or None."""
        return None

    def shape_advantage(self, advantage: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        """The advantage [N] before AEPO's form mixes its signal into it."""
        return advantage

    def scale_advantage(
        self, advantage: torch.Tensor, logprob: torch.Tensor, lever: float
    ) -> torch.Tensor:
        """The advantage [N] after AEPO's form."""
        return advantage

    def ratio_logprobs(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """The two log-probs of the policy loss's ratio, [N]."""
        return tokens.logprob, tokens.old_logprob

    def on_policy_loss(self, per_token: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """The policy loss [N] with the selection applied."""
        return per_token

    def bonus(self, coef: float, entropy: float | None) -> float:
        """The bonus's coefficient for the coming step; entropy: the last one measured, nats."""
        return 0.0

    def next_bonus(self, coef: float, entropy: float) -> float:
        """The coefficient after a step of this entropy."""
        return coef

    def first_lever(self) -> float:
        """The lever at the start of a run."""
        return 0.0

    def next_lever(self, lever: float, integral: float, entropy: float) -> tuple[float, float]:
        """Lever and integral of errors after a step of this entropy, nats."""
        return lever, integral


class Bonus(Regulariser):
    """The entropy bonus, -coef H, with a constant coefficient."""

    all_samples_active = True

    def bonus(self, coef: float, entropy: float | None) -> float:
        """The setting."""
        return coef


class AdaptiveBonus(Regulariser):
    """The bonus of Skywork-OR1 (arXiv 2505.22312), which moves towards a target entropy.

    Its coefficient goes up by `adaptive_delta` while the entropy is below `adaptive_target`, down
    by it otherwise, never below 0, and is applied only while below.
    """

    all_samples_active = True
    adapts_bonus = True

    def bonus(self, coef: float, entropy: float | None) -> float:
        """The coefficient, 0 unless the entropy is below the target."""
        below = entropy is not None and entropy < self.loss.adaptive_target
        return coef if below else 0.0

    def next_bonus(self, coef: float, entropy: float) -> float:
        """One `adaptive_delta` up or down."""
        sign = 1.0 if entropy < self.loss.adaptive_target else -1.0
        return max(0.0, coef + sign * self.loss.adaptive_delta)


class EntropyAdvantage(Regulariser):
    """Adds entropy to the advantage (`entropy_advantage`)."""

    def shape_advantage(self, advantage: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        """A + min(coef H, |A| / kappa)."""
        coef, kappa = self.loss.advantage_entropy_coef, self.loss.advantage_entropy_kappa
        return entropy_advantage(advantage, entropy, coef=coef, kappa=kappa)


class TopEntropy(Regulariser):
    """The 80/20 rule: only tokens of high entropy are trained (`top_entropy_mask`)."""

    needs_old_logprobs = True

    def select(
        self,
        old: TokenValues,
        advantage: torch.Tensor,
        main: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor | None:
        """The tokens that are trained."""
        return top_entropy_mask(old.entropy[main], self.loss.top_entropy_fraction)

    def on_policy_loss(self, per_token: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Theirs alone."""
        return per_token * tokens.column["selected"]


class ClipCov(Regulariser):
    """Clip-Cov: some tokens of high covariance lose their gradient (`clip_cov_mask`)."""

    needs_old_logprobs = True

    def select(
        self,
        old: TokenValues,
        advantage: torch.Tensor,
        main: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor | None:
        """The tokens that lose it."""
        return clip_cov_mask(
            old.logprob[main],
            advantage[main],
            fraction=self.loss.cov_fraction,
            low=self.loss.clip_cov_low,
            high=self.loss.clip_cov_high,
            generator=generator,
        )

    def on_policy_loss(self, per_token: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """That of the other tokens."""
        return per_token * (1 - tokens.column["selected"])


class KlCov(Regulariser):
    """KL-Cov: tokens of the highest covariance are penalised (`kl_cov_mask`)."""

    needs_old_logprobs = True
    all_samples_active = True

    def select(
        self,
        old: TokenValues,
        advantage: torch.Tensor,
        main: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor | None:
        """The tokens that are penalised."""
        fraction = self.loss.cov_fraction
        return kl_cov_mask(old.logprob[main], advantage[main], fraction=fraction)

    def on_policy_loss(self, per_token: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """With the penalty |log pi - log pi_old|."""
        distance = (tokens.logprob - tokens.old_logprob).abs()
        return per_token + self.loss.kl_cov_coef * tokens.column["selected"] * distance


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
