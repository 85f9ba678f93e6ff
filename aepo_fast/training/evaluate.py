"""Sampled evaluation: avg@k with a confidence interval, and the unbiased pass@k."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aepo_fast.rewards.reward import Reward, RewardError
from aepo_fast.rollout.engine import RolloutEngine
from aepo_fast.rollout.scored import sample_and_score
from aepo_fast.samples import Completion, Prompt, Request, seed_of
from aepo_fast.training.eval_statistics import (
    Comparison,
    Interval,
    ProblemResult,
    clustered_interval,
    powers_of_two,
)
from aepo_fast.world import ALONE, World


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found, over `num_prompts` prompts of `num_samples` samples each.

    avg_at_k: mean reward. ci95: its 95% interval. pass_at_k: k -> share of prompts with a reward
    of at least 1 among k samples, pass_ci95: k -> its 95% interval. errors: samples whose scoring
    failed, left out of all figures. problems: the same for each prompt. settings: what was
    evaluated, and how. comparison: with another evaluation, where one was asked for.
    """

    avg_at_k: float
    ci95: Interval
    pass_at_k: dict[int, float]
    num_prompts: int
    num_samples: int
    mean_length: float
    truncated: float
    errors: int
    pass_ci95: dict[int, Interval] = field(default_factory=dict)
    problems: tuple[ProblemResult, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    comparison: Comparison | None = None

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
        passes = ", ".join(
            f"pass@{k} {value:.3f} (95% {self.pass_ci95[k][0]:.3f}-{self.pass_ci95[k][1]:.3f})"
            for k, value in self.pass_at_k.items()
            if k > 1
        )
        errors = f", {self.errors} samples without a reward" if self.errors else ""
        return (
            f"avg@{self.num_samples} {self.avg_at_k:.3f} "
            f"(95% {self.ci95[0]:.3f}-{self.ci95[1]:.3f}){', ' + passes if passes else ''}, "
            f"mean length {self.mean_length:.1f}, {self.num_prompts} prompts x "
            f"{self.num_samples} samples{errors}"
        )


def problem_id(prompt: Prompt) -> str:
    """The same for a question in every evaluation, whatever instruction and template it gets."""
    asked = json.dumps(prompt.columns["prompt"], sort_keys=True, default=str)
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


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
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    ks: Sequence[int] = (),
    on_tokens: Callable[[int], None] = lambda tokens: None,
    on_group: Callable[[int, list[Completion]], None] = lambda index, group: None,
    world: World = ALONE,
) -> EvalResult:
    """Sample every prompt `samples` times and score the completions.

    Raises what `sample_and_score` does, and RewardError where no sample has a reward.

    temperature, top_p, top_k: see `Request`. ks: of pass@k, up to `samples`; empty: the powers of
    two. A k for which a prompt has too few samples with a reward is left out.

    overlap: score them while others are still being sampled. on_tokens, on_group, world: as there.
    """
    requests = [
        Request(prompt.token_ids, samples, temperature, seed_of(seed, index), top_p, top_k)
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
    problems = []
    for prompt, group in zip(prompts, found.scores, strict=True):
        valid = [value for value in group.rewards if value is not None]
        if valid:
            correct, mean = sum(value >= 1 for value in valid), sum(valid) / len(valid)
            problems.append(ProblemResult(problem_id(prompt), len(valid), correct, mean))
    if not problems:
        raise RewardError("evaluation: no sample could be scored; see the reported reward errors")
    smallest = min(problem.samples for problem in problems)
    means = [problem.reward for problem in problems]
    estimates = {
        k: [problem.pass_at_k(k) for problem in problems]
        for k in ks or powers_of_two(smallest)
        if k <= smallest
    }
    return EvalResult(
        avg_at_k=sum(means) / len(means),
        ci95=clustered_interval(means),
        pass_at_k={k: sum(values) / len(values) for k, values in estimates.items()},
        num_prompts=len(problems),
        num_samples=samples,
        mean_length=sum(len(c.completion_ids) for c in flat) / len(flat),
        truncated=sum(c.finish_reason == "length" for c in flat) / len(flat),
        errors=found.errors,
        pass_ci95={k: clustered_interval(values) for k, values in estimates.items()},
        problems=tuple(problems),
    )
