"""Estimators of an evaluation and their intervals, from what was found of each problem.

Samples of one problem are not independent of each other, so every interval takes the problem as its
unit, and of two evaluations of the same problems the difference of each (arXiv 2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Interval = tuple[float, float]


@dataclass(frozen=True)
class ProblemResult:
    """What was found of one problem.

    id: of its question, the same in every evaluation. samples: those with a reward. correct: those
    with a reward of at least 1. reward: their mean reward.
    """

    id: str
    samples: int
    correct: int
    reward: float

    def pass_at_k(self, k: int) -> float:
        """See `pass_at_k`."""
        return pass_at_k(self.samples, self.correct, k)


@dataclass(frozen=True)
class Comparison:
    """How far an evaluation is ahead of `other`, over the problems that both hold.

    difference: of avg@k. ci95: its paired 95% interval. pass_at_k: k -> the same of pass@k. notes:
    settings that are not the same in both.
    """

    other: str
    difference: float
    ci95: Interval
    pass_at_k: dict[int, tuple[float, Interval]]
    num_prompts: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        def line(name: str, value: float, interval: Interval) -> str:
            return f"{name} {value:+.3f} (95% {interval[0]:+.3f} to {interval[1]:+.3f})"

        found = [line("avg@k", self.difference, self.ci95)]
        found += [line(f"pass@{k}", *values) for k, values in self.pass_at_k.items() if k > 1]
        notes = "".join(f"\n{note}" for note in self.notes)
        return (
            f"difference to {self.other}, paired over {self.num_prompts} prompts: "
            f"{', '.join(found)}{notes}"
        )


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is correct (arXiv 2107.03374).

    1 - C(n - c, k) / C(n, k), for n samples of which c were correct, k <= n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k}: must lie in [1, {num_samples}], the number of samples")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def clustered_interval(prompt_means: Sequence[float]) -> Interval:
    """95% normal interval of a mean whose samples cluster by prompt, from the prompts' means.

    Stays within [0, 1] where every mean does, as the rewards of verifiers do.
    """
    share = all(0 <= value <= 1 for value in prompt_means)
    low, high = (0.0, 1.0) if share else (-math.inf, math.inf)
    return _normal_interval(prompt_means, low, high)


def paired_interval(differences: Sequence[float]) -> Interval:
    """95% normal interval of a mean difference, from the difference of each problem.

    Stays within [-1, 1] where every difference does.
    """
    share = all(abs(value) <= 1 for value in differences)
    low, high = (-1.0, 1.0) if share else (-math.inf, math.inf)
    return _normal_interval(differences, low, high)


def _normal_interval(values: Sequence[float], low: float, high: float) -> Interval:
    count = len(values)
    if count < 2:
        return low, high
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = 1.96 * math.sqrt(variance / count)
    return max(low, mean - half), min(high, mean + half)


def powers_of_two(most: int) -> tuple[int, ...]:
    """The k of pass@k where none are asked for: 1, 2, 4 and so on, and `most`."""
    return tuple(sorted({1, *(2**power for power in range(11) if 2**power <= most), most}))


def compare_problems(
    ours: Sequence[ProblemResult],
    theirs: Sequence[ProblemResult],
    *,
    other: str,
    ks: Sequence[int],
    notes: Sequence[str] = (),
) -> Comparison:
    """Our evaluation minus another's, over the problems that both have, at least one.

    Of pass@k only those of `ks` that both have the samples for.
    """
    known = {problem.id: problem for problem in theirs}
    pairs = [(problem, known[problem.id]) for problem in ours if problem.id in known]

    def paired(differences: list[float]) -> tuple[float, Interval]:
        return sum(differences) / len(differences), paired_interval(differences)

    fewest = min(problem.samples for pair in pairs for problem in pair)
    difference, ci95 = paired([a.reward - b.reward for a, b in pairs])
    return Comparison(
        other=other,
        difference=difference,
        ci95=ci95,
        pass_at_k={
            k: paired([a.pass_at_k(k) - b.pass_at_k(k) for a, b in pairs])
            for k in ks
            if k <= fewest
        },
        num_prompts=len(pairs),
        notes=tuple(notes),
    )
