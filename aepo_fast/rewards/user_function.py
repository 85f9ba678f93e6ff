"""A reward function of the user's, called with TRL's arguments in a process of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import RewardConfig
from aepo_fast.rewards.process import Answer, ScoringProcess
from aepo_fast.samples import Prompt


@dataclass(frozen=True)
class Score:
    """What a completion got: a reward, None without one, or a problem in place of it.

    problem: empty where there is none. traceback: of the function that failed.
    """

    reward: float | None = None
    problem: str = ""
    traceback: str = ""


# So many completions of a call that has failed may fail by themselves before the others are left.
_FAILURES = 3
Scorer = Callable[[Sequence[Prompt], Sequence[str], Sequence[Sequence[int]]], list[Score]]


def user_scorer(cfg: RewardConfig) -> tuple[Scorer, ScoringProcess, tuple[str, ...]]:
    """The function that `reward.function` names as a scorer, its process, the columns it needs.

    Raises ConfigError where it cannot be imported. Where a call fails and errors are counted, its
    completions are scored one by one, to lose no more than those that fail.
    """
    process = ScoringProcess(
        "aepo_fast.rewards.user_call:load_function",
        (cfg.function,),
        timeout_s=cfg.timeout_s,
        memory=cfg.memory_bytes,
        user_code=True,
    )
    ready = process.start()
    refused = (ready.value or {}).get("refused")
    if ready.problem:
        module = cfg.function.split(":")[0]
        refused = f"importing {module!r} failed: {ready.problem}", "Correct the module"
    if refused:
        process.close()
        raise ConfigError("reward.function", cfg.function, *refused)
    takes = ready.value["takes"]

    def score(
        prompts: Sequence[Prompt], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Score]:
        arguments = trl_arguments(prompts, texts, completion_ids)
        if takes is not None:
            arguments = {name: value for name, value in arguments.items() if name in takes}
        (answer,) = process.ask([(len(texts), arguments)])
        if not answer.problem or cfg.on_error == "stop" or len(texts) == 1:
            return _scores(answer, len(texts))
        warnings.warn(
            f"reward {cfg.function!r}: a call for {len(texts)} completions failed, so they are "
            f"scored one by one: {answer.problem}",
            RuntimeWarning,
            stacklevel=2,
        )
        most = max(_FAILURES, cfg.allowed_errors(len(texts)))
        return _one_by_one(process, arguments, len(texts), most)

    return score, process, tuple(ready.value["columns"])


def _one_by_one(
    process: ScoringProcess, arguments: dict[str, list[Any]], count: int, most: int
) -> list[Score]:
    """Score each completion in a call of its own; after `most` failures the rest fail unasked."""
    scores: list[Score] = []
    failures = 0
    for index in range(count):
        if failures > most:
            return scores + [Score(problem=f"not scored: {failures} others of its call failed")] * (
                count - index
            )
        single = {name: [values[index]] for name, values in arguments.items()}
        (answer,) = process.ask([(1, single)])
        failures += bool(answer.problem)
        scores += _scores(answer, 1)
    return scores


def _scores(answer: Answer, count: int) -> list[Score]:
    if answer.problem:
        return [Score(None, answer.problem, answer.traceback)] * count
    return [Score(reward, problem) for reward, problem in answer.value]


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
