"""Five rivals that steer entropy through the advantage or the scored law, chosen by one key.

What `loss.entropy_method` does, with A the advantage, pi the token's probability, H the entropy:

- entropic (EntroPIC, arXiv 2511.15248): on tokens of pi > 0.95, A (1 + a sign A) with
  a = clip(Kp (H - H0) + Ki sum of past errors, -1, 1).
- repo_r (REPO-R, 2603.11682): A (1 - sign(A) zeta log pi), no change of sign; zeta is doubled or
  halved towards H0.
- era (ERA, 2510.08549): rows of A > 0 and low entropy are scored with their logits times k.
- ucpo (UCPO, 2605.00365): A n ((1 - tau) / n + tau (1 / q) / sum(1 / q)) in a group's n correct
  rows, whose law is q.
- ds_grpo (DS-GRPO, 2511.19942): A - gamma log pi(y) for correct rows, A + gamma log pi(y) else.

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
from aepo_fast.samples import Sample, TokenValues

# Those that need the log-probs and entropies of whole rows before the update.
ROW_METHODS = ("era", "ucpo", "ds_grpo")
# ERA judges a response by its tokens of highest entropy, UCPO bounds 1/q.
_ERA_TOP_SHARE = 0.2
_UCPO_MIN_Q = 1e-6


class RivalController:
    """a of "entropic" and zeta of "repo_r", moved by each step's entropy; 0 for other methods.

    EntroPIC: the integral holds the errors before the last, as in its code, and is not bounded.
    The paper's error is of the batch being trained; here it is of the step before, whose entropy is
    known in time, and a is 0 until then. REPO-R: below H0 a positive zeta doubles and a negative
    one halves, above it the reverse; where |zeta| would fall below its minimum the sign changes.
    The paper takes the initial entropy as H0, here it is the setting.
    """

    def __init__(self, cfg: LossConfig) -> None:
        self.cfg = cfg
        self.value = cfg.repo_r_zeta if cfg.entropy_method == "repo_r" else 0.0
        self.integral = 0.0

    def update(self, entropy: float) -> None:
        """Take in the entropy of a step; one that is not finite is not a measurement."""
        if not math.isfinite(entropy):
            return
        cfg, error = self.cfg, entropy - self.cfg.adaptive_target
        if cfg.entropy_method == "entropic":
            signal = cfg.entropic_kp * error + cfg.entropic_ki * self.integral
            self.value = min(1.0, max(-1.0, signal))
            self.integral += error
        elif cfg.entropy_method == "repo_r":
            wanted = 1.0 if error < 0 else -1.0
            size = abs(self.value) * (2.0 if self.value * wanted > 0 else 0.5)
            sign = math.copysign(1.0, self.value)
            if size < cfg.repo_r_zeta_min:
                size, sign = cfg.repo_r_zeta_min, -sign
            self.value = sign * min(size, cfg.repo_r_zeta_max)

    def state_dict(self) -> dict[str, float | str]:
        """What a checkpoint needs."""
        method = self.cfg.entropy_method
        return {"method": method, "value": self.value, "integral": self.integral}

    def load_state_dict(self, state: dict[str, float | str]) -> None:
        """Go on from a saved state; what another method left is no starting value."""
        if state["method"] == self.cfg.entropy_method:
            self.value, self.integral = float(state["value"]), float(state["integral"])


def token_advantage(
    loss: LossConfig, advantage: torch.Tensor, logprob: torch.Tensor, value: float
) -> torch.Tensor:
    """The advantage under "entropic" or "repo_r", [N], `value` being their controller's.

    EntroPIC's code adds -a r |A| to the loss, outside the clip; scaling A is the same wherever the
    clip does not act, and serves all policy losses. Both take pi of the current policy.
    """
    logprob, sign = logprob.detach(), advantage.sign()
    if loss.entropy_method == "entropic":
        likely = logprob > math.log(loss.entropic_min_prob)
        return torch.where(likely, advantage * (1 + value * sign), advantage)
    if loss.entropy_method == "repo_r":
        return advantage * (1 - value * sign * logprob).clamp(min=0)
    return advantage


def scored_logprobs(
    loss: LossConfig,
    column: dict[str, torch.Tensor],
    logprob: torch.Tensor,
    old: torch.Tensor,
    second_logprob: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two log-probs of the policy loss's ratio, [N]: under ERA partly those at logits x k.

    second_logprob, differentiable, and the column old_second_logprob are at temperature 1/k.
    """
    if loss.entropy_method != "era":
        return logprob, old
    assert second_logprob is not None
    scaled = column["scaled"] > 0
    return (
        torch.where(scaled, second_logprob, logprob),
        torch.where(scaled, column["old_second_logprob"], old),
    )


def row_columns(
    loss: LossConfig,
    rows: Sequence[Sample],
    per_row: dict[str, torch.Tensor],
    scores: TokenValues | None,
) -> dict[str, torch.Tensor]:
    """The per-row columns, [R] each, that ROW_METHODS change or add; none for other methods.

    per_row: advantage, main and positive of the minibatch, which holds whole groups.
    """
    if loss.entropy_method not in ROW_METHODS:
        return {}
    assert scores is not None
    lengths = torch.tensor([row.length for row in rows])
    advantage, main = per_row["advantage"], per_row["main"] > 0
    positive = per_row["positive"] > 0
    if loss.entropy_method == "era":
        low = response_entropy(scores.entropy, lengths) < loss.era_entropy_low
        return {"scaled": (main & low & (advantage > 0)).float()}
    row_of_token = torch.arange(len(rows)).repeat_interleave(lengths)
    mean_logprob = sequence_means(scores.logprob, row_of_token, len(rows))
    if loss.entropy_method == "ds_grpo":
        logprob = mean_logprob * lengths
        return {"advantage": ds_grpo_advantage(advantage, logprob, main, positive, loss)}
    groups = torch.tensor([row.group for row in rows])
    advantage = advantage.clone()
    for group in groups[positive].unique():
        members = positive & (groups == group)
        advantage[members] *= ucpo_weights(mean_logprob[members], loss.ucpo_tau)
    return {"advantage": advantage}


def response_entropy(entropy: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the 20% of a row's tokens where it is highest, [R]; 0 without tokens.

    The share is rounded down to at least one token, as in ERA's code (arXiv 2510.08549), whose runs
    on mathematics also give the bound and k. Left out is its second bound, 3 nats, above which rows
    are scored at logits / k: the head gives one second temperature a pass. Rows are judged by the
    policy that sampled, and stay so over the updates of a step.
    """
    means = [
        part.topk(max(1, int(_ERA_TOP_SHARE * len(part)))).values.mean()
        if len(part)
        else entropy.new_zeros(())
        for part in entropy.split(lengths.tolist())
    ]
    return torch.stack(means)


def ucpo_weights(mean_logprob: torch.Tensor, tau: float) -> torch.Tensor:
    """Factors of the advantages of a group's n correct rows, [n] with mean 1 (arXiv 2605.00365).

    q = softmax of the rows' mean log-probs, as in its code; factors
    (1 - tau) + tau n (1 / q) / sum(1 / q). Each row keeps its own A, where the code takes one for
    all: they differ only by length penalties. Correct is what AEPO counts as positive.
    """
    inverse = 1 / mean_logprob.softmax(0).clamp(min=_UCPO_MIN_Q)
    return (1 - tau) + tau * len(inverse) * inverse / inverse.sum()


def ds_grpo_advantage(
    advantage: torch.Tensor,
    logprob: torch.Tensor,
    main: torch.Tensor,
    positive: torch.Tensor,
    loss: LossConfig,
) -> torch.Tensor:
    """A - gamma log pi(y) for correct rows, A + gamma log pi(y) for wrong ones, [R] (2511.19942).

    logprob: of whole rows under the policy that sampled, [R]. As in the paper's algorithm the sum
    is not normalised by length nor by the group's spread; one gamma serves both sides, and its
    default is ours, since the paper's values could not be read.
    """
    shift = loss.ds_grpo_gamma * logprob
    return torch.where(main, advantage + torch.where(positive, -shift, shift), advantage)
