"""Scores completions: task verifiers, math-verify, and the user's own functions."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aepo_fast.config import ConfigError, DataConfig, RewardConfig
from aepo_fast.data import Prompt
from aepo_fast.math_worker import MathWorker
from aepo_fast.tasks import score_task, task_verifier

# Arguments of TRL's reward signature that are no columns of the data.
_OWN_ARGUMENTS = ("prompts", "completions", "completion_ids")


class RewardError(RuntimeError):
    """A completion could not be scored: names the function and the sample."""


@dataclass(frozen=True)
class RewardResult:
    """rewards: one per completion, None where it has none. errors: how many of those failed."""

    rewards: list[float | None]
    errors: int


# One value, or the exception in its place, per completion.
Scorer = Callable[[Sequence[Prompt], Sequence[str], Sequence[Sequence[int]]], list[Any]]


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
    function = import_function(cfg.function)
    scorer = _user_scorer(function, cfg)
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
            return float(worker.verify(gold_answer(prompt.columns["answer"]), text))
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


def gold_answer(answer: Any) -> str:
    """The right answer of a row as text: a number, LaTeX, or what follows GSM8K's "####"."""
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    text = str(answer)
    return text.rsplit("####", 1)[-1].strip() if "####" in text else text.strip()


def import_function(name: str) -> Callable[..., Any]:
    """Import "module:function", from the working directory too; raises ConfigError."""
    module_name, function_name = name.split(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does when imported
        reason = f"importing {module_name!r} failed: {type(error).__name__}: {error}"
        fix = "Correct the module, or run where it can be imported"
        raise ConfigError("reward.function", name, reason, fix) from error
    function = vars(module).get(function_name)
    if not callable(function):
        reason = f"the module {module_name!r} has no function {function_name!r}"
        raise ConfigError("reward.function", name, reason, "Correct the name")
    return function


def columns_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The columns a reward function reads: its arguments without a default."""
    return tuple(
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in _OWN_ARGUMENTS
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    )


def _user_scorer(function: Callable[..., Any], cfg: RewardConfig) -> Scorer:
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    taken = {parameter.name for parameter in parameters}

    def call(arguments: dict[str, list[Any]]) -> Any:
        result = function(**arguments)
        return asyncio.run(_wait(result)) if inspect.isawaitable(result) else result

    def score(
        prompts: Sequence[Prompt], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Any]:
        arguments = trl_arguments(prompts, texts, completion_ids)
        if not takes_all:
            arguments = {name: value for name, value in arguments.items() if name in taken}
        try:
            values = run_with_timeout(lambda: list(call(arguments)), cfg.timeout_s)
        except Exception as error:  # the user's code; reported by Reward.score
            return [error] * len(texts)
        if len(values) != len(texts):
            reason = f"returned {len(values)} rewards for {len(texts)} completions"
            return [ValueError(reason)] * len(texts)
        return values

    return score


async def _wait(awaitable: Any) -> Any:
    return await awaitable


def trl_arguments(
    prompts: Sequence[Prompt], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
) -> dict[str, list[Any]]:
    """Keyword arguments of TRL's reward signature, one entry per completion in each list.

    Where the data's prompt is a string, prompt and completion are strings; where it is a list of
    messages, so is the completion. A column that a source lacks is None for its samples.
    """
    originals = [prompt.columns["prompt"] for prompt in prompts]
    names = {name for prompt in prompts for name in prompt.columns} - {"prompt"}
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in sorted(names)}
    return {
        **columns,
        "prompts": originals,
        "completions": [
            text if isinstance(original, str) else [{"role": "assistant", "content": text}]
            for original, text in zip(originals, texts, strict=True)
        ],
        "completion_ids": [list(ids) for ids in completion_ids],
    }


def run_with_timeout(function: Callable[[], Any], timeout_s: float) -> Any:
    """Call a function in a thread and return its result; raises TimeoutError, or what it raised.

    After a timeout the thread goes on by itself: Python cannot stop it, only stop waiting.
    """
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:  # also SystemExit: the caller is to hear of it
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name="reward")
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise TimeoutError(f"no result within reward.timeout_s = {timeout_s}")
    value, error = outcome[0]
    if isinstance(error, Exception):
        raise error
    if error is not None:
        raise RuntimeError(f"{type(error).__name__}: {error}")
    return value
