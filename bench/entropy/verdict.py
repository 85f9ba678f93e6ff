"""Does AEPO keep its promise? What the finished runs say to each target."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from bench.entropy.measures import (
    Misses,
    Part,
    by_setting,
    grouped,
    last_half,
    late,
    misses,
    trailing_means,
)
from bench.entropy.settings import BASE, OURS, TRIED

# Of H0, over the last half: the 5-step mean in every run, and as the mean over a target's seeds.
MOST_OFF, MEAN_OFF = 0.10, 0.05
# Targets up to here shall cost no accuracy.
FREE_TARGET = 0.5
# The base model's pass@k at the largest k counts as improvable below this.
IMPROVABLE = 0.95
# GRPO's entropy that counts as a collapse, nats.
COLLAPSED = 0.1
FEWEST_SAMPLES = 8  # pass@k is compared from this k on
# What was measured, and whether the target is met; None: not comparable.
Finding = tuple[str, bool | None]
# The methods that are ours, but for the one that is judged.
_FORMS = ("one_pass", "expected", "pi", "uncooled", *TRIED)


def table(parts: list[Part]) -> str:
    """One row per target and task: what was measured, and whether the target is met."""
    rows = ["| target | task | measured | met |", "|---|---|---|---|"]
    tasks = grouped(parts, lambda part: part["task"])
    overall = _spread(list(tasks.values()))
    for name, judge in _TARGETS.items():
        for task, mine in tasks.items():
            for measured, met in judge(mine, _spread([mine]) or overall):
                verdict = {True: "yes", False: "no", None: "-"}[met]
                rows.append(f"| {name} | {task} | {measured} | {verdict} |")
    return "\n".join(rows)


def _of(parts: list[Part], setting: str) -> list[Part]:
    return [part for part in parts if part["setting"] == setting]


def _held(parts: list[Part], _: float) -> list[Finding]:
    found = []
    for target, runs in grouped(_of(parts, OURS), lambda part: part["target"]).items():
        mean = statistics.fmean(run["held"]["mean"] for run in runs)
        most = [run["held"]["max"] for run in runs]
        shown = ", ".join(f"{value:.0%}" for value in most)
        found.append(
            (
                f"H0 {target:g}: {mean:.1%} on average, at most {shown} by seed{_reasons(runs)}",
                mean <= MEAN_OFF and max(most) <= MOST_OFF,
            )
        )
    return found


def _reasons(runs: list[Part]) -> str:
    """How many means are beyond the band, and why; nothing where none is."""
    each = [misses(run["entropy"], run["target"], MOST_OFF) for run in runs]
    total = Misses(*(sum(counts) for counts in zip(*each, strict=True)))
    if not sum(total):
        return ""
    means = sum(len(last_half(run["entropy"])) for run in runs)
    return (
        f"; {sum(total)} of {means} means are beyond: {total.early} before the first within, "
        f"{total.above} others above, {total.below} below"
    )


def _accuracy(parts: list[Part], _: float) -> list[Finding]:
    """Ours by seed, with GRPO's of the same seed and the interval that it must reach."""
    grpo = {run["seed"]: run["evaluation"] for run in _of(parts, "grpo")}
    found = []
    for target, runs in grouped(_of(parts, OURS), lambda part: part["target"]).items():
        pairs = [(r["evaluation"], grpo[r["seed"]]) for r in runs if r["seed"] in grpo]
        if target <= FREE_TARGET and pairs:
            shown = ", ".join(
                f"{mine['accuracy']:.3f} to {its['accuracy']:.3f} (from {its['ci95'][0]:.3f})"
                for mine, its in pairs
            )
            met = all(mine["accuracy"] >= its["ci95"][0] for mine, its in pairs)
            found.append((f"H0 {target:g}: {shown}", met))
    return found


def at_entropy(curve: list[tuple[float, float]], entropy: float) -> float | None:
    """The reward of a curve of (entropy, reward) at an entropy, in straight lines.

    None where the curve does not reach: nothing is said of what was not run.
    """
    points = sorted(curve)
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if left <= entropy <= right:
            share = (entropy - left) / (right - left) if right > left else 0.0
            return low + share * (high - low)
    return None


def _late(runs: list[Part]) -> tuple[float, float]:
    """`late`, means over seeds."""
    found = [late(run) for run in runs]
    return statistics.fmean(h for h, _ in found), statistics.fmean(r for _, r in found)


def _entropy_error(one: list[Part], other: list[Part]) -> float:
    """The standard error of the difference of two late entropies, each a mean over seeds."""
    variances = (
        statistics.variance(late(run)[0] for run in runs) / len(runs) if len(runs) > 1 else 0.0
        for runs in (one, other)
    )
    return math.sqrt(sum(variances))


def _reward(parts: list[Part], spread: float) -> list[Finding]:
    """Ours and GRPO's, means over seeds."""
    grpo = _of(parts, "grpo")
    found: list[Finding] = []
    for target, runs in grouped(_of(parts, OURS), lambda part: part["target"]).items():
        if target <= FREE_TARGET and grpo:
            (_, mine), (_, its) = _late(runs), _late(grpo)
            margin = _margin(spread, (mine, len(runs)), (its, len(grpo)))
            shown = f"H0 {target:g}: {mine:.3f} to {its:.3f}{_shown(margin)}"
            found.append((shown, mine >= its - margin))
    return found


def _matched(parts: list[Part], spread: float) -> list[Finding]:
    """Each rival's mean over seeds beside our curve, which begins with GRPO: the lever at rest."""
    ours = list(grouped(_of(parts, OURS), lambda part: part["target"]).values())
    grpo = _of(parts, "grpo")
    if not ours or not grpo:
        return []
    points = sorted(((_late(runs), runs) for runs in (grpo, *ours)), key=lambda point: point[0])
    curve = [point for point, _ in points]
    fewest = min(len(runs) for _, runs in points)
    found: list[Finding] = []
    for (name, target), runs in by_setting(parts).items():
        if name in (BASE, OURS, "grpo", *_FORMS):
            continue
        entropy, reward = _late(runs)
        mine = at_entropy(curve, entropy)
        for (edge, at_edge), its in (points[0], points[-1]):
            if mine is None and abs(entropy - edge) <= 2 * _entropy_error(runs, its):
                mine = at_edge  # seeds differ by more than these two entropies do
        label = name if target is None else f"{name} at H0 {target:g}"
        shown = f"{label}: {reward:.3f} at {entropy:.2f} nats"
        if mine is None:
            reach = f"{min(curve)[0]:.2f} to {max(curve)[0]:.2f}"
            found.append((f"{shown}; ours has {reach}", None))
        else:
            margin = _margin(spread, (mine, fewest), (reward, len(runs)))
            found.append((f"{shown}, ours {mine:.3f}{_shown(margin)}", mine >= reward - margin))
    return found


def _spread(tasks: list[list[Part]]) -> float:
    """The deviation of the late reward over seeds, pooled over settings; 0 without any.

    tasks: the parts of each task. A task with one seed is judged by the spread of the others. The
    unit is the standard deviation of a single sample's reward, 0 or 1: a mean of 0.99 jitters less
    from seed to seed than one of 0.9.
    """
    squares, degrees = 0.0, 0
    settings = [runs for parts in tasks for runs in by_setting(parts).values() if len(runs) > 1]
    for runs in settings:
        rewards = [late(run)[1] for run in runs]
        unit = _deviation(statistics.fmean(rewards))
        if unit > 0:
            squares += statistics.variance(rewards) / unit**2 * (len(runs) - 1)
            degrees += len(runs) - 1
    return math.sqrt(squares / max(degrees, 1))


def _deviation(mean: float) -> float:
    """The standard deviation of what is 1 with a probability of the mean, else 0."""
    return math.sqrt(mean * (1 - mean))


def _margin(spread: float, one: tuple[float, int], other: tuple[float, int]) -> float:
    """Two standard errors of the difference of two late rewards, each a mean over so many seeds."""
    unit = _deviation((one[0] + other[0]) / 2)
    return 2 * spread * unit * math.sqrt(1 / one[1] + 1 / other[1])


def _shown(margin: float) -> str:
    return f" (± {margin:.3f})" if margin else ""


def _curve(runs: list[Part]) -> dict[int, float]:
    common = set.intersection(*(set(run["evaluation"]["pass_at_k"]) for run in runs))
    return {
        k: statistics.fmean(run["evaluation"]["pass_at_k"][str(k)] for run in runs)
        for k in sorted(map(int, common))
    }


def _pass_at_k(parts: list[Part], _: float) -> list[Finding]:
    grpo, base = _of(parts, "grpo"), _of(parts, BASE)
    found: list[Finding] = []
    for target, runs in grouped(_of(parts, OURS), lambda part: part["target"]).items():
        mine = _curve(runs)
        most = max(mine)
        if grpo:
            its = _curve(grpo)
            behind = [k for k in mine if k >= FEWEST_SAMPLES and k in its and mine[k] < its[k]]
            at = f"pass@{most} {mine[most]:.3f}, GRPO's {its.get(most, float('nan')):.3f}"
            where = (
                f"behind it at k = {', '.join(map(str, behind))}" if behind else "never behind it"
            )
            found.append((f"H0 {target:g}: {at}; {where}", not behind))
        first = _curve(base).get(most, 1.0) if base else 1.0
        if first < IMPROVABLE:
            text = f"H0 {target:g}: pass@{most} {mine[most]:.3f}, the base model's {first:.3f}"
            found.append((text, mine[most] >= first))
    return found


def _collapse(parts: list[Part], _: float) -> list[Finding]:
    last = [trailing_means(run["entropy"])[-1] for run in _of(parts, "grpo")]
    if not last:
        return []
    shown = ", ".join(f"{value:.2f}" for value in last)
    return [(f"{shown} nats at the end, by seed", max(last) < COLLAPSED)]


# Each judges the parts of one task, given the spread of late rewards over seeds.
_TARGETS: dict[str, Callable[[list[Part], float], list[Finding]]] = {
    "entropy within 10% of H0 (5-step means, last half), 5% on average": _held,
    "accuracy as GRPO's or in its 95% interval, H0 <= 0.5": _accuracy,
    "reward as GRPO's (last sixth of the steps), H0 <= 0.5": _reward,
    "reward at matched entropy (last sixth of the steps), against each rival": _matched,
    "pass@k of GRPO from k = 8, of the base at the largest k": _pass_at_k,
    "GRPO collapses below 0.1 nats": _collapse,
}
