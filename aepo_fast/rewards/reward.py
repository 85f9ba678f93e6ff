"""Scores completions: with a task's verifier, with math-verify, or with the user's function."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from reasoning_gym.dataset import ProceduralDataset

from aepo_fast.config.data import DataConfig
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import RewardConfig
from aepo_fast.data.tasks import CORRECT, check_task, task_verifier
from aepo_fast.rewards.math_answers import gold_text
from aepo_fast.rewards.process import ScoringProcess
from aepo_fast.rewards.user_call import to_reward
from aepo_fast.rewards.user_function import Score, Scorer, user_scorer
from aepo_fast.samples import Prompt

_CHECKED = 4  # prompts of a task


class RewardError(RuntimeError):
    """A completion could not be scored: names the function and the sample."""


@dataclass(frozen=True)
class RewardResult:
    """rewards: one per completion, None where it has none. errors: how many of those failed.

    first: of the first failure, what failed, with its prompt and completion; empty without one.
    """

    rewards: list[float | None]
    errors: int
    first: str = field(default="", repr=False, compare=False)


@dataclass(frozen=True)
class Reward:
    """A reward function with its error policy; `required_columns` are read from the data."""

    name: str
    required_columns: tuple[str, ...]
    scorer: Scorer
    cfg: RewardConfig
    process: ScoringProcess | None = None

    def abandon(self) -> None:
        """End for good, with whatever is being scored in another thread."""
        if self.process is not None:
            self.process.abandon()

    def score(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        *,
        warn: bool = True,
    ) -> RewardResult:
        """Score completions, given with the prompt of each.

        What fails (an exception, a timeout, a crash, a value that is no finite number) is counted
        and None, and the first such sample is warned about; with on_error = "stop" it raises
        RewardError. It is never a 0.
        """
        if not texts:
            return RewardResult([], 0)
        scores = self.scorer(prompts, texts, completion_ids)
        failed = [index for index, score in enumerate(scores) if score.problem]
        first = ""
        if failed:
            index = failed[0]
            first = (
                f"reward {self.name!r} failed on sample {index} of {len(texts)}: "
                f"{self._problem(scores[index])}\n"
                f"prompt: {prompts[index].messages[-1]['content']!r:.300}\n"
                f"completion: {texts[index]!r:.300}"
            )
            if self.cfg.on_error == "stop":
                raise RewardError(first)
            if warn:
                warnings.warn(first, RuntimeWarning, stacklevel=2)
        return RewardResult([score.reward for score in scores], len(failed), first)

    def check_share(self, errors: int, total: int, first: str) -> None:
        """Raise RewardError where more of a step's samples failed than may.

        first: of their first, as in `RewardResult`.
        """
        if errors > self.cfg.allowed_errors(total):
            raise RewardError(
                f"{errors} of {total} samples could not be scored, more than "
                f"reward.max_error_share = {self.cfg.max_error_share} allows. The first: {first}"
            )

    def _problem(self, score: Score) -> str:
        problem = score.problem
        if problem.startswith("MemoryError"):
            problem += f" (reward.memory_gib = {self.cfg.memory_gib})"
        return f"{problem}\n{score.traceback}" if score.traceback else problem


def build_reward(cfg: RewardConfig, data: DataConfig) -> Reward:
    """The reward that `reward.function` names, its process started.

    Raises ConfigError if there is none, or if a task's verifier is none.
    """
    if cfg.function in ("task", "math_verify"):
        scorer, process = _builtin_scorer(cfg, data)
        return Reward(cfg.function, ("answer",), scorer, cfg, process)
    scorer, process, columns = user_scorer(cfg)
    return Reward(cfg.function, columns, scorer, cfg, process)


def _builtin_scorer(cfg: RewardConfig, data: DataConfig) -> tuple[Scorer, ScoringProcess]:
    tasks = {
        index: source
        for index, source in enumerate(data.sources)
        if cfg.function == "task" and source.kind == "reasoning_gym"
    }
    for source in tasks.values():
        check_task(source)
    process = ScoringProcess(
        "aepo_fast.rewards.verifiers:load_verifiers",
        (
            {index: (source.name, source.params) for index, source in tasks.items()},
            len(tasks) < len(data.sources),
        ),
        timeout_s=cfg.timeout_s,
        memory=cfg.memory_bytes,
        user_code=False,
    )
    process.begin()

    def right(prompt: Prompt) -> Any:
        row = prompt.columns
        return row if prompt.source in tasks else gold_answer(row["answer"])

    def score(
        prompts: Sequence[Prompt], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Score]:
        scores: dict[int, Score] = {}
        requests: dict[int, tuple[int, Any, str]] = {}
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            try:
                requests[index] = prompt.source, right(prompt), text
            except Exception as error:  # of an answer that may be anything
                scores[index] = Score(problem=f"{type(error).__name__}: {error}")
        for index, answer in zip(requests, process.ask([*requests.values()]), strict=True):
            if answer.problem:
                scores[index] = Score(None, answer.problem, answer.traceback)
            else:
                scores[index] = Score(*to_reward(answer.value))
        return [scores[index] for index in range(len(texts))]

    return score, process


def check_answers(reward: Reward, data: DataConfig, prompts: Sequence[Prompt]) -> None:
    """Raise ConfigError for a task whose right answers the reward cannot do anything with.

    A task's verifier must accept a right answer of its own, of the first few prompts. Some tasks
    know none: their verifier looks at the question alone, and other rewards have nothing to read.
    """
    for index, source in enumerate(data.sources):
        if source.kind != "reasoning_gym":
            continue
        rows = [prompt.columns for prompt in prompts if prompt.source == index]
        if reward.name == "task":
            rows = [row for row in rows[:_CHECKED] if row["answer"] is not None]
            problem = _refusal(task_verifier(source), rows)
            if problem:
                reason = f"the task's verifier fails on right answers of its own: {problem}"
                fix = "Choose other data.sources.params, or another task"
                raise ConfigError("data.sources.name", source.name, reason, fix)
        elif "answer" in reward.required_columns and any(row["answer"] is None for row in rows):
            reason = f"reads the column 'answer', and the task {source.name!r} has rows without one"
            raise ConfigError("reward.function", reward.name, reason, 'Use "task"')


def _refusal(verifier: ProceduralDataset, rows: Sequence[dict[str, Any]]) -> str:
    """Why a verifier accepts none of these rows' own answers; empty where it does, or has none."""
    problem = ""
    for row in rows:
        try:
            if verifier.score_answer(row["answer"], row) >= CORRECT:
                return ""
            problem = f"{row['answer']!r:.100} is no right answer to it"
        except Exception as error:  # of any kind: it is not our code
            problem = f"{type(error).__name__}: {error}"
    return problem


def gold_answer(answer: Any) -> str | None:
    """The right answer of a row as text, None where it says nothing: `math_answers.gold_text`."""
    return gold_text(answer)


def soft_overlong_penalty(length: int, max_length: int, zone: int) -> float:
    """DAPO's length penalty: 0, then down to -1 over the last `zone` tokens (arXiv 2503.14476)."""
    return min(0.0, (max_length - zone - length) / zone) if zone else 0.0
