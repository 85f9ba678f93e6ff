"""What the process of a user's reward function runs: imports the function and calls it."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable
from typing import Any

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.user_code import import_function

# Arguments of TRL's reward signature that are no columns of the data.
OWN_ARGUMENTS = ("prompts", "completions", "completion_ids")
# Arguments that TRL gives of its trainer, which does not run here.
_OF_TRLS_TRAINER = ("trainer_state", "log_extra", "log_metric")


def columns_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The columns a reward function reads: its arguments without a default."""
    return tuple(
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in OWN_ARGUMENTS
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    )


def load_function(
    name: str,
) -> tuple[Callable[[tuple[int, dict[str, Any]]], list[Any]] | None, dict[str, Any]]:
    """Import "module:function"; returns what calls it, and what the parent must know of it.

    The call takes (number of completions, arguments) and returns `to_reward` of each value. Known
    are `columns`, as of `columns_of`, and `takes`, the names of all arguments, None where it takes
    any. `refused` has the parts of a ConfigError instead.
    """
    try:
        function = import_function("reward.function", name)
    except ConfigError as error:
        return None, {"refused": [error.reason, error.fix]}
    columns = columns_of(function)
    for argument in _OF_TRLS_TRAINER:
        if argument in columns:
            reason = f"its argument {argument!r} is of TRL's trainer, which does not run here"
            return None, {"refused": [reason, f"Give it a default: {argument}=None"]}
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    takes = None if takes_all else [parameter.name for parameter in parameters]
    # One event loop for all calls: a client that the module keeps belongs to the loop of its first.
    runner = asyncio.Runner()

    def call(request: tuple[int, dict[str, Any]]) -> list[Any]:
        count, arguments = request
        result = function(**arguments)
        if inspect.isawaitable(result):
            result = runner.run(_wait(result))
        values = list(result)
        if len(values) != count:  # nothing that calls of one completion each would mend
            return [(None, f"returned {len(values)} rewards for {count} completions")] * count
        return [to_reward(value) for value in values]

    return call, {"columns": columns, "takes": takes}


async def _wait(awaitable: Any) -> Any:
    return await awaitable


def to_reward(value: Any) -> tuple[float | None, str]:
    """What a function returned for a sample, as a number, and what is wrong with it.

    None is no reward and nothing wrong, as in TRL: the function does not apply to this sample.
    """
    if value is None:
        return None, ""
    try:
        reward = float(value)
    except Exception:  # of the value's own __float__
        return None, f"returned {_shown(value)}, which is no number"
    return (reward, "") if math.isfinite(reward) else (None, f"returned {reward}")


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.100}"
    except Exception:  # of the value's own __repr__
        return f"a {type(value).__name__}"
