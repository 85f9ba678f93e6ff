"""A reward function of the user's, called with TRL's arguments."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

from aepo_fast.config.sections import RewardConfig
from aepo_fast.samples import Prompt

# Arguments of TRL's reward signature that are no columns of the data.
_OWN_ARGUMENTS = ("prompts", "completions", "completion_ids")


# One value, or the exception in its place, per completion.
Scorer = Callable[[Sequence[Prompt], Sequence[str], Sequence[Sequence[int]]], list[Any]]


def columns_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The columns a reward function reads: its arguments without a default."""
    return tuple(
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in _OWN_ARGUMENTS
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    )


def user_scorer(function: Callable[..., Any], cfg: RewardConfig) -> Scorer:
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
