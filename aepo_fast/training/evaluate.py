"""Sampled evaluation: avg@k with a confidence interval, and the unbiased pass@k."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aepo_fast.rewards.reward import Reward, RewardError
from aepo_fast.rollout.engine import RolloutEngine
from aepo_fast.rollout.scored import sample_and_score
from aepo_fast.samples import Completion, Prompt, Request, seed_of
from aepo_fast.world import ALONE, World


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found, over `num_prompts` prompts of `num_samples` samples each.

    avg_at_k: mean reward. ci95: its 95% interval. pass_at_k: k -> share of prompts with a reward
    of at least 1 among k samples. errors: samples whose scoring failed, left out of all figures.
    """

    avg_at_k: float
    ci95: tuple[float, float]
    pass_at_k: dict[int, float]
    num_prompts: int
    num_samples: int
    mean_length: float
    truncated: float
    errors: int

    def metrics(self) -> dict[str, float]:
        """The figures under their names in metrics.jsonl."""
        k = max(self.pass_at_k)
        return {
            "eval/avg@k": self.avg_at_k,
            "eval/pass@k": self.pass_at_k[k],
            "eval/k": k,
            "eval/ci95_low": self.ci95[0],
            "eval/ci95_high": self.ci95[1],
            "eval/prompts": self.num_prompts,
            "eval/mean_length": self.mean_length,
            "eval/clipped_ratio": self.truncated,
            "eval/reward_errors": self.errors,
        }

    def __str__(self) -> str:
        passes = ", ".join(f"pass@{k} {value:.3f}" for k, value in self.pass_at_k.items() if k > 1)
        return (
            f"avg@{self.num_samples} {self.avg_at_k:.3f} "
            f"(95% {self.ci95[0]:.3f}-{self.ci95[1]:.3f}){', ' + passes if passes else ''}, "
            f"mean length {self.mean_length:.1f}, {self.num_prompts} prompts x "
            f"{self.num_samples} samples"
        )


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is correct (arXiv 2107.03374).

    1 - C(n - c, k) / C(n, k), for n samples of which c were correct, k <= n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k}: must lie in [1, {num_samples}], the number of samples")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def clustered_interval(prompt_means: Sequence[float]) -> tuple[float, float]:
    """95% normal interval of a mean whose samples cluster by prompt, from the prompts' means.

    Stays within [0, 1] where every mean does, as the rewards of verifiers do.
    """
    count = len(prompt_means)
    mean = sum(prompt_means) / count
    share = all(0 <= value <= 1 for value in prompt_means)
    low, high = (0.0, 1.0) if share else (-math.inf, math.inf)
    if count < 2:
        return low, high
    variance = sum((value - mean) ** 2 for value in prompt_means) / (count - 1)
    half = 1.96 * math.sqrt(variance / count)
    return max(low, mean - half), min(high, mean + half)


def evaluate(
    engine: RolloutEngine,
    reward: Reward,
    prompts: Sequence[Prompt],
    decode: Callable[[Sequence[int]], str],
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    overlap: bool,
    on_tokens: Callable[[int], None] = lambda tokens: None,
    on_group: Callable[[int, list[Completion]], None] = lambda index, group: None,
    world: World = ALONE,
) -> EvalResult:
    """Sample every prompt `samples` times at temperature 1 and score the completions.

    Raises what `sample_and_score` does, and RewardError where no sample has a reward.

    overlap: score them while others are still being sampled. on_tokens, on_group, world: as there.
    """
    requests = [
        Request(prompt.token_ids, samples, 1.0, seed_of(seed, index))
        for index, prompt in enumerate(prompts)
    ]
    found = sample_and_score(
        engine,
        reward,
        prompts,
        requests,
        decode,
        world=world,
        max_new_tokens=max_new_tokens,
        overlap=overlap,
        on_tokens=on_tokens,
        on_group=on_group,
    )
    flat = [completion for group in found.groups for completion in group]
    kept: list[list[float]] = []
    for group in found.scores:
        valid = [value for value in group.rewards if value is not None]
        if valid:
            kept.append(valid)
    if not kept:
        raise RewardError("evaluation: no sample could be scored; see the reported reward errors")
    smallest = min(len(group) for group in kept)
    ks = sorted({1, *(2**power for power in range(11) if 2**power <= smallest), smallest})
    means = [sum(group) / len(group) for group in kept]
    return EvalResult(
        avg_at_k=sum(means) / len(means),
        ci95=clustered_interval(means),
        pass_at_k={
            k: sum(pass_at_k(len(g), sum(r >= 1 for r in g), k) for g in kept) / len(kept)
            for k in ks
        },
        num_prompts=len(kept),
        num_samples=samples,
        mean_length=sum(len(c.completion_ids) for c in flat) / len(flat),
        truncated=sum(c.finish_reason == "length" for c in flat) / len(flat),
        errors=found.errors,
    )
