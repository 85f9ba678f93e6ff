"""Scores completions: with a task's verifier, with math-verify, or with the user's function."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aepo_fast.config.sections import DataConfig, RewardConfig
from aepo_fast.config.user_code import import_function
from aepo_fast.data.tasks import score_task, task_verifier
from aepo_fast.rewards.math_answers import gold_text, unusable_gold
from aepo_fast.rewards.math_worker import MathWorker
from aepo_fast.rewards.user_function import (
    Scorer,
    columns_of,
    run_with_timeout,
    user_scorer,
)
from aepo_fast.samples import Prompt


class RewardError(RuntimeError):
    """A completion could not be scored: names the function and the sample."""


@dataclass(frozen=True)
class RewardResult:
    """rewards: one per completion, None where it has none. errors: how many of those failed."""

    rewards: list[float | None]
    errors: int


@dataclass(frozen=True)
class Reward:
    """A reward function with its error policy; `required_columns` are read from the data."""

    name: str
    required_columns: tuple[str, ...]
    scorer: Scorer
    stop_on_error: bool

    def score(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
    ) -> RewardResult:
        """Score completions, given with the prompt of each.

        What fails (an exception, a timeout, a value that is no finite number) raises RewardError
        or, with on_error = "count", is warned about, counted and None. It is never a 0.
        """
        if not texts:
            return RewardResult([], 0)
        rewards: list[float | None] = []
        errors = 0
        for index, value in enumerate(self.scorer(prompts, texts, completion_ids)):
            reward, problem = _to_reward(value)
            if problem:
                errors += 1
                message = (
                    f"reward {self.name!r} failed on sample {index} of {len(texts)}: {problem}\n"
                    f"prompt: {prompts[index].messages[-1]['content']!r:.300}\n"
                    f"completion: {texts[index]!r:.300}"
                )
                if self.stop_on_error:
                    cause = value if isinstance(value, BaseException) else None
                    raise RewardError(message) from cause
                if errors == 1:
                    warnings.warn(message, RuntimeWarning, stacklevel=2)
            rewards.append(reward)
        return RewardResult(rewards, errors)


def _to_reward(value: Any) -> tuple[float | None, str]:
    if value is None:  # as in TRL: the function does not apply to this sample
        return None, ""
    if isinstance(value, BaseException):
        return None, f"{type(value).__name__}: {value}"
    try:
        reward = float(value)
    except Exception:  # of the value's own __float__
        return None, f"returned {value!r:.100}, which is no number"
    return (reward, "") if math.isfinite(reward) else (None, f"returned {reward}")


def build_reward(cfg: RewardConfig, data: DataConfig) -> Reward:
    """The reward that `reward.function` names; raises ConfigError if there is none."""
    stop = cfg.on_error == "stop"
    if cfg.function in ("task", "math_verify"):
        scorer = _builtin_scorer(cfg, data)
        return Reward(cfg.function, ("answer",), scorer, stop)
    function = import_function("reward.function", cfg.function)
    scorer = user_scorer(function, cfg)
    return Reward(cfg.function, columns_of(function), scorer, stop)


def _builtin_scorer(cfg: RewardConfig, data: DataConfig) -> Scorer:
    worker = MathWorker(cfg.timeout_s)
    verifiers = {
        index: task_verifier(source)
        for index, source in enumerate(data.sources)
        if cfg.function == "task" and source.kind == "reasoning_gym"
    }

    def score_one(prompt: Prompt, text: str) -> float:
        if prompt.source not in verifiers:
            answer = prompt.columns["answer"]
            problem = unusable_gold(answer)
            if problem:
                reason = f"cannot parse the right answer {answer!r:.100}, {problem}"
                raise ValueError(reason)
            return float(bool(worker.verify(gold_answer(answer), text)))
        verifier = verifiers[prompt.source]
        return run_with_timeout(lambda: score_task(verifier, prompt.columns, text), cfg.timeout_s)

    def score(
        prompts: Sequence[Prompt], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Any]:
        values: list[Any] = []
        for prompt, text in zip(prompts, texts, strict=True):
            try:
                values.append(score_one(prompt, text))
            except Exception as error:  # a verifier fed with anything; reported by Reward.score
                values.append(error)
        return values

    return score


def gold_answer(answer: Any) -> str | None:
    """The right answer of a row as text, None where it says nothing: `math_answers.gold_text`."""
    return gold_text(answer)


def soft_overlong_penalty(length: int, max_length: int, zone: int) -> float:
    """DAPO's length penalty: 0, then down to -1 over the last `zone` tokens (arXiv 2503.14476)."""
    return min(0.0, (max_length - zone - length) / zone) if zone else 0.0
