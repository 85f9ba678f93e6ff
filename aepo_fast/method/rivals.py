"""Five rivals that steer entropy through the advantage or the ratio, and all methods' table.

What `loss.entropy_method` does, with A the advantage, pi the token's probability, H the entropy:

- entropic (EntroPIC, arXiv 2511.15248): on tokens of pi > 0.95, A (1 + a sign A) with
  a = clip(Kp (H - H0) + Ki sum of past errors, -1, 1).
- repo_r (REPO-R, 2603.11682): A (1 - sign(A) zeta log pi), no change of sign; zeta is doubled or
  halved towards H0.
- era (ERA, 2510.08549): log-probs of samples of A > 0 and low entropy are of logits times k.
- ucpo (UCPO, 2605.00365): A n ((1 - tau) / n + tau (1 / q) / sum(1 / q)) in a group's n correct
  samples, whose distribution is q.
- ds_grpo (DS-GRPO, 2511.19942): A - gamma log pi(y) where correct, A + gamma log pi(y) else.

H0 is `loss.adaptive_target`; era, ucpo and ds_grpo have no target. The first four multiply A, so
they have nothing to act on in a group of equal rewards; ds_grpo adds to A. Entropies are in nats
at temperature 1; the formulas' quantities carry no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from aepo_fast.config.method import LossConfig
from aepo_fast.method.policy_losses import sequence_means
from aepo_fast.method.regularisers import (
    AdaptiveBonus,
    Bonus,
    ClipCov,
    EntropyAdvantage,
    KlCov,
    Regulariser,
    TopEntropy,
)
from aepo_fast.method.tokens import Columns, Tokens
from aepo_fast.samples import Sample, TokenValues

# ERA judges a response by its tokens of highest entropy, UCPO bounds 1/q.
_ERA_TOP_SHARE = 0.2
_UCPO_MIN_Q = 1e-6


class Entropic(Regulariser):
    """EntroPIC; its lever is a.

    The integral holds the errors before the last, as in its code, and is not bounded. The paper's
    error is of the batch being trained; here it is of the step before, whose entropy is known in
    time, and a is 0 until then. Its code adds -a r |A| to the loss, outside the clip; scaling A is
    the same wherever the clip does not act, and serves all policy losses.
    """

    def next_lever(self, lever: float, integral: float, entropy: float) -> tuple[float, float]:
        """clip(Kp (H - H0) + Ki sum of past errors, -1, 1)."""
        error = entropy - self.loss.adaptive_target
        signal = self.loss.entropic_kp * error + self.loss.entropic_ki * integral
        return min(1.0, max(-1.0, signal)), integral + error

    def scale_advantage(
        self, advantage: torch.Tensor, logprob: torch.Tensor, lever: float
    ) -> torch.Tensor:
        """A (1 + a sign A) on likely tokens; pi is that of the current policy."""
        logprob, sign = logprob.detach(), advantage.sign()
        likely = logprob > math.log(self.loss.entropic_min_prob)
        return torch.where(likely, advantage * (1 + lever * sign), advantage)


class RepoR(Regulariser):
    """REPO-R; its lever is zeta.

    Below H0 a positive zeta doubles and a negative one halves, above it the reverse; where |zeta|
    would fall below its minimum the sign changes. The paper takes the initial entropy as H0, here
    it is the setting.
    """

    def first_lever(self) -> float:
        """The setting."""
        return self.loss.repo_r_zeta

    def next_lever(self, lever: float, integral: float, entropy: float) -> tuple[float, float]:
        """zeta doubled or halved."""
        loss, wanted = self.loss, 1.0 if entropy < self.loss.adaptive_target else -1.0
        size = abs(lever) * (2.0 if lever * wanted > 0 else 0.5)
        sign = math.copysign(1.0, lever)
        if size < loss.repo_r_zeta_min:
            size, sign = loss.repo_r_zeta_min, -sign
        return sign * min(size, loss.repo_r_zeta_max), integral

    def scale_advantage(
        self, advantage: torch.Tensor, logprob: torch.Tensor, lever: float
    ) -> torch.Tensor:
        """A (1 - sign(A) zeta log pi), no change of sign; pi is that of the current policy."""
        logprob, sign = logprob.detach(), advantage.sign()
        return advantage * (1 - lever * sign * logprob).clamp(min=0)


class Era(Regulariser):
    """ERA: the log-probs of samples of A > 0 and low entropy are those of their logits times k."""

    needs_old_logprobs = True

    def second_temperature(self) -> float | None:
        """1/k, that of logits times k."""
        return 1 / self.loss.era_scale

    def sample_columns(
        self, samples: Sequence[Sample], per_sample: Columns, old: TokenValues | None
    ) -> Columns:
        """scaled: 1 for these samples."""
        assert old is not None
        lengths = torch.tensor([sample.length for sample in samples])
        low = response_entropy(old.entropy, lengths) < self.loss.era_entropy_low
        return {"scaled": ((per_sample["main"] > 0) & low & (per_sample["advantage"] > 0)).float()}

    def ratio_logprobs(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Partly those at temperature 1/k, as are second_logprob and old_second_logprob."""
        assert tokens.second_logprob is not None
        scaled = tokens.column["scaled"] > 0
        old_second = tokens.column["old_second_logprob"]
        return (
            torch.where(scaled, tokens.second_logprob, tokens.logprob),
            torch.where(scaled, old_second, tokens.old_logprob),
        )


class Ucpo(Regulariser):
    """UCPO: the advantages of a group's correct samples by the rarity of each (`ucpo_weights`)."""

    needs_old_logprobs = True

    def sample_columns(
        self, samples: Sequence[Sample], per_sample: Columns, old: TokenValues | None
    ) -> Columns:
        """The advantage."""
        assert old is not None
        mean_logprob = _mean_logprobs(samples, old)
        positive = per_sample["positive"] > 0
        groups = torch.tensor([sample.group for sample in samples])
        advantage = per_sample["advantage"].clone()
        for group in groups[positive].unique():
            members = positive & (groups == group)
            advantage[members] *= ucpo_weights(mean_logprob[members], self.loss.ucpo_tau)
        return {"advantage": advantage}


class DsGrpo(Regulariser):
    """DS-GRPO: log pi of the sample added to the advantage (`ds_grpo_advantage`)."""

    needs_old_logprobs = True

    def sample_columns(
        self, samples: Sequence[Sample], per_sample: Columns, old: TokenValues | None
    ) -> Columns:
        """The advantage."""
        assert old is not None
        logprob = _mean_logprobs(samples, old) * torch.tensor([sample.length for sample in samples])
        main, positive = per_sample["main"] > 0, per_sample["positive"] > 0
        gamma = self.loss.ds_grpo_gamma
        return {
            "advantage": ds_grpo_advantage(per_sample["advantage"], logprob, main, positive, gamma)
        }


ENTROPY_METHODS: dict[str, type[Regulariser]] = {
    "none": Regulariser,
    "bonus": Bonus,
    "adaptive_bonus": AdaptiveBonus,
    "entropy_advantage": EntropyAdvantage,
    "top_entropy": TopEntropy,
    "clip_cov": ClipCov,
    "kl_cov": KlCov,
    "entropic": Entropic,
    "repo_r": RepoR,
    "era": Era,
    "ucpo": Ucpo,
    "ds_grpo": DsGrpo,
}


def make_regulariser(loss: LossConfig) -> Regulariser:
    """The method that `loss.entropy_method` names."""
    return ENTROPY_METHODS[loss.entropy_method](loss)


def _mean_logprobs(samples: Sequence[Sample], old: TokenValues) -> torch.Tensor:
    """Mean log-prob of each sample's tokens, [R]."""
    lengths = torch.tensor([sample.length for sample in samples])
    sample_of_token = torch.arange(len(samples)).repeat_interleave(lengths)
    return sequence_means(old.logprob, sample_of_token, len(samples))


def response_entropy(entropy: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the 20% of a sample's tokens where it is highest, [R]; 0 without tokens.

    The share is rounded down to at least one token, as in ERA's code (arXiv 2510.08549), whose runs
    on mathematics also give the bound and k. Left out is its second bound, 3 nats, above which the
    log-probs are of logits / k: the head gives one second temperature a pass. Samples are judged by
    the policy that sampled, and stay so over the updates of a step.
    """
    means = [
        part.topk(max(1, int(_ERA_TOP_SHARE * len(part)))).values.mean()
        if len(part)
        else entropy.new_zeros(())
        for part in entropy.split(lengths.tolist())
    ]
    return torch.stack(means)


def ucpo_weights(mean_logprob: torch.Tensor, tau: float) -> torch.Tensor:
    """Factors of the advantages of a group's n correct samples, [n] with mean 1 (arXiv 2605.00365).

    q = softmax of the samples' mean log-probs, as in its code; factors
    (1 - tau) + tau n (1 / q) / sum(1 / q). Each sample keeps its own A, where the code takes one
    for all: they differ only by length penalties. Correct is what AEPO counts as positive.
    """
    inverse = 1 / mean_logprob.softmax(0).clamp(min=_UCPO_MIN_Q)
    return (1 - tau) + tau * len(inverse) * inverse / inverse.sum()


def ds_grpo_advantage(
    advantage: torch.Tensor,
    logprob: torch.Tensor,
    main: torch.Tensor,
    positive: torch.Tensor,
    gamma: float,
) -> torch.Tensor:
    """A - gamma log pi(y) where correct, A + gamma log pi(y) where wrong, [R] (2511.19942).

    logprob: of whole samples under the policy that sampled, [R]. As in the paper's algorithm the
    sum is not normalised by length nor by the group's spread; one gamma serves both sides, and its
    default is ours, since the paper's values could not be read.
    """
    shift = gamma * logprob
    return torch.where(main, advantage + torch.where(positive, -shift, shift), advantage)
