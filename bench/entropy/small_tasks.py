"""The tasks of the small size: their prompts, what the base model imitates, their verifiers.

write: a number is given, and any expression of three one-digit terms that equals it is right.
reach: the same, with numbers that the base model has not seen: few expressions are right for them.
value: an expression is given; after a free scratch, "=" and its value are right, and nothing else.
The base model's scratch repeats the expression's terms in some order.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

# All that a model of the small size reads and writes.
CHARACTERS = "0123456789+-=.:"

# write: numbers that three one-digit terms reach in many ways: 36 to 186 of 4,000 expressions.
WRITE_NUMBERS = range(21)
# reach: up to the largest number that three terms reach, which one expression does.
REACH_NUMBERS = range(28)
# write, reach: three digits, two signs and the end.
WRITE_TOKENS = 6

# value: expressions, of which data.holdout_fraction is kept from training.
VALUE_PROMPTS = 1024
# value: terms of 0 to so much.
VALUE_MOST = 9

_WRITTEN = re.compile(r"\d[+-]\d[+-]\d", re.ASCII)
_TERM = re.compile(r"[+-]?\d+", re.ASCII)
_VALUE = re.compile(r"-?\d+", re.ASCII)


@dataclass(frozen=True)
class SmallTask:
    """A task: its prompts, and a prompt with a completion for the base model to imitate.

    example: from a random stream; without the end token, which every completion has.
    """

    name: str
    prompts: Callable[[], list[str]]
    example: Callable[[random.Random], tuple[str, str]]


def sum_of(expression: str) -> int:
    """The value of terms that are joined by + and -."""
    return sum(int(term) for term in _TERM.findall(expression))


@cache
def right_expressions() -> dict[int, tuple[str, ...]]:
    """Number -> all expressions that are right for it, of the numbers of write and reach."""
    found: dict[int, list[str]] = {number: [] for number in REACH_NUMBERS}
    for a, b, c in itertools.product(range(10), repeat=3):
        for first, second in itertools.product("+-", repeat=2):
            expression = f"{a}{first}{b}{second}{c}"
            if sum_of(expression) in found:
                found[sum_of(expression)].append(expression)
    return {number: tuple(expressions) for number, expressions in found.items()}


def written_ceiling(numbers: Sequence[int]) -> float:
    """The most entropy at accuracy 1, nats per token: all right expressions equally likely."""
    found = right_expressions()
    return sum(math.log(len(found[number])) for number in numbers) / len(numbers) / WRITE_TOKENS


# Tasks that bound the entropy of a policy that is always right; elsewhere scratch is free.
CEILINGS = {"write": written_ceiling(WRITE_NUMBERS), "reach": written_ceiling(REACH_NUMBERS)}


def _write_prompts(numbers: Sequence[int]) -> list[str]:
    return [f"{number}:" for number in numbers]


def _write_example(rng: random.Random) -> tuple[str, str]:
    number = rng.choice(WRITE_NUMBERS)
    return f"{number}:", rng.choice(right_expressions()[number])


def _expression(rng: random.Random) -> str:
    terms = [str(rng.randint(0, VALUE_MOST)) for _ in range(3)]
    return terms[0] + "".join(rng.choice("+-") + term for term in terms[1:])


def _value_prompts() -> list[str]:
    rng = random.Random(0)
    expressions: dict[str, None] = {}
    while len(expressions) < VALUE_PROMPTS:
        expressions[_expression(rng)] = None
    return [f"{expression}:" for expression in expressions]


def _value_example(rng: random.Random) -> tuple[str, str]:
    expression = _expression(rng)
    terms = _TERM.findall(expression)
    rng.shuffle(terms)
    scratch = "".join(term if term[0] in "+-" else f"+{term}" for term in terms)
    scratch = scratch.removeprefix("+")
    return f"{expression}:", f"{scratch}={sum_of(expression)}."


TASKS = {
    task.name: task
    for task in (
        SmallTask("write", lambda: _write_prompts(WRITE_NUMBERS), _write_example),
        SmallTask("reach", lambda: _write_prompts(REACH_NUMBERS), _write_example),
        SmallTask("value", _value_prompts, _value_example),
    )
}


def is_written(prompt: str, text: str) -> bool:
    """Whether a text is an expression of three one-digit terms that equals the prompt's number."""
    return bool(_WRITTEN.fullmatch(text)) and sum_of(text) == int(prompt.removesuffix(":"))


def is_value(prompt: str, text: str) -> bool:
    """Whether what stands between a text's last "=" and its final "." is the prompt's value."""
    before, equals, value = text.rpartition("=")
    if not equals or not value.endswith(".") or not _VALUE.fullmatch(value[:-1]):
        return False
    return int(value[:-1]) == sum_of(prompt.removesuffix(":"))


def reward_write(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """1 for a right expression, else 0."""
    return [float(is_written(*pair)) for pair in zip(prompts, completions, strict=True)]


def reward_value(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """1 for the right value, else 0."""
    return [float(is_value(*pair)) for pair in zip(prompts, completions, strict=True)]
