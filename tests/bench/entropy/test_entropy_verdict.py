"""The verdict on the entropy benchmark's targets, from parts made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from bench.entropy import verdict
from bench.entropy.settings import OURS


def _part(setting: str, target: float | None = None, seed: int = 0, **found: Any) -> dict[str, Any]:
    evaluation = {
        "accuracy": 0.5,
        "ci95": [0.4, 0.6],
        "entropy": 0.5,
        "pass_at_k": {"8": 0.9, "16": 0.95},
    }
    part = {
        "task": "write",
        "setting": setting,
        "target": target,
        "seed": seed,
        "entropy": [0.5] * 4,
    }
    part["held"] = {"mean": 0.02, "max": found.pop("max", 0.05)}
    part["entropy"] = [found.pop("last", 0.5)] * 4
    part["reward"] = [found.pop("reward", 0.5)] * 4
    return {**part, "evaluation": {**evaluation, **found}}


def _rows(*parts: dict[str, Any]) -> list[str]:
    return verdict.table(list(parts)).splitlines()[2:]


def _row(word: str, *parts: dict[str, Any]) -> str:
    (row,) = [row for row in _rows(*parts) if word in row]
    return row


def test_one_seed_beyond_the_band_misses_the_target() -> None:
    good, bad = _part(OURS, 0.5), _part(OURS, 0.5, seed=1, max=0.11)
    assert _row("within 10%", good).endswith("| yes |")
    row = _row("within 10%", good, bad)
    assert "2.0% on average, at most 5%, 11% by seed |" in row and row.endswith("| no |")
    high = _part(OURS, 0.5, last=0.6)
    row = _row("within 10%", good, high)
    assert "; 2 of 4 means are beyond: 2 before the first within, 0 others above" in row


def test_accuracy_is_judged_against_the_same_seed() -> None:
    grpo = [_part("grpo", accuracy=0.9, ci95=[0.8, 1.0]), _part("grpo", seed=1, ci95=[0.1, 0.3])]
    ours = [_part(OURS, 0.5, accuracy=0.81), _part(OURS, 0.5, seed=1, accuracy=0.2)]
    assert _row("95% interval", *grpo, *ours).endswith("| yes |")
    worse = [_part(OURS, 0.5, accuracy=0.79), ours[1]]
    assert _row("95% interval", *grpo, *worse).endswith("| no |")
    assert not [row for row in _rows(*grpo, _part(OURS, 0.75)) if "95% interval" in row]


def test_rivals_are_judged_on_the_line_between_our_runs() -> None:
    parts = [
        _part("grpo", reward=0.9, last=0.1),
        _part(OURS, 0.5, reward=0.8, last=0.5),
        _part("era", reward=0.84, last=0.3),
        _part("ucpo", reward=0.86, last=0.3),
        _part("entropic", 0.75, reward=0.7, last=0.8),
        _part("split", 0.5, reward=0.99, last=0.3),
    ]
    rows = [row for row in _rows(*parts) if "matched" in row]
    assert len(rows) == 3
    assert "era: 0.840 at 0.30 nats, ours 0.850 | yes" in rows[0]
    assert "ucpo" in rows[1] and rows[1].endswith("| no |")
    assert "ours has 0.10 to 0.50 | -" in rows[2]
    assert verdict.at_entropy([(0.2, 0.9), (0.2, 0.7)], 0.2) == pytest.approx(0.7)


@pytest.mark.parametrize(("spread", "found"), [(0.03, "ours 0.900"), (0.02, "ours has 0.20")])
def test_entropies_that_seeds_cannot_tell_apart_are_matched(spread: float, found: str) -> None:
    # Two seeds `spread` from each mean: an error of `spread` a mean, sqrt(2) times that of both.
    parts = [_part(OURS, 0.5, reward=0.8)]
    for seed, off in ((0, -spread), (1, spread)):
        parts += [
            _part("grpo", seed=seed, reward=0.9, last=0.2 + off),
            _part("era", seed=seed, reward=0.9, last=0.13 + off),
        ]
    assert found in _row("matched", *parts)


@pytest.mark.parametrize(
    ("rival", "margin", "verdict_of_it"), [(0.91, "0.028", "yes"), (0.93, "0.026", "no")]
)
def test_rivals_within_the_spread_of_seeds_are_equal(
    rival: float, margin: str, verdict_of_it: str
) -> None:
    # Seeds 0.01 from their mean: a standard deviation of 0.01414, two errors of 0.0283.
    parts = _three_settings(rival)
    row = _row("matched", *parts)
    assert f"era: {rival:.3f} at 0.30 nats, ours 0.900 (± {margin}) | {verdict_of_it} |" in row
    row = _row("reward as GRPO's", *parts)
    assert "H0 0.5: 0.900 to 0.900 (± 0.028) | yes |" in row


def _three_settings(rival: float = 0.9) -> list[dict[str, Any]]:
    """GRPO, ours and a rival, two seeds each; GRPO's and ours have the reward 0.9."""
    share = (rival * (1 - rival) / 0.09) ** 0.5  # as far apart, for their mean
    parts = []
    for seed, off in ((0, -0.01), (1, 0.01)):
        parts += [
            _part("grpo", seed=seed, reward=0.9 + off, last=0.1),
            _part(OURS, 0.5, seed=seed, reward=0.9 + off, last=0.5),
            _part("era", seed=seed, reward=rival + off * share, last=0.3),
        ]
    return parts


@pytest.mark.parametrize(
    ("mine", "its", "margin", "verdict_of_it"),
    # The spread, 0.01414 where the mean is 0.9, is a share of sqrt(0.9 x 0.1) = 0.3; the margin is
    # two of these, times sqrt(2) for two runs, times the deviation at the mean of both.
    [(0.87, 0.93, "0.040", "no"), (0.89, 0.91, "0.040", "yes"), (0.98, 1.0, "0.013", "no")],
)
def test_rewards_near_one_are_equal_only_within_less(
    mine: float, its: float, margin: str, verdict_of_it: str
) -> None:
    # A task with one seed is judged by the spread of the others.
    alone = [_part("grpo", reward=its), _part(OURS, 0.5, reward=mine)]
    rows = _rows(*_three_settings(), *({**part, "task": "reach"} for part in alone))
    (row,) = [row for row in rows if "reward as GRPO's" in row and "| reach |" in row]
    assert f"H0 0.5: {mine:.3f} to {its:.3f} (± {margin}) | {verdict_of_it} |" in row


def test_the_late_reward_is_judged_against_grpos() -> None:
    ours = _part(OURS, 0.5, reward=0.8)
    assert _row("reward as GRPO's", ours, _part("grpo", reward=0.8)).endswith("| yes |")
    row = _row("reward as GRPO's", ours, _part("grpo", reward=0.81))
    assert "H0 0.5: 0.800 to 0.810 | no |" in row
    assert not [row for row in _rows(_part("grpo"), _part(OURS, 0.75)) if "reward as" in row]


def test_pass_at_k_is_compared_at_every_k() -> None:
    ours = _part(OURS, 0.5, pass_at_k={"1": 0.1, "8": 0.8, "16": 0.96})
    grpo = _part("grpo", pass_at_k={"1": 0.5, "8": 0.81, "16": 0.9})
    assert _row("pass@k of GRPO", ours, grpo).count("behind it at k = 8 | no") == 1
    base = _part("base", pass_at_k={"8": 0.5, "16": 0.94})
    (_, row) = [row for row in _rows(ours, grpo, base) if "pass@k of GRPO" in row]
    assert "0.960, the base model's 0.940 | yes" in row
    solved = _part("base", pass_at_k={"16": 0.96})
    assert len([row for row in _rows(ours, grpo, solved) if "pass@k of GRPO" in row]) == 1


def test_a_collapse_is_that_of_every_seed() -> None:
    runs = [_part("grpo", last=0.05), _part("grpo", seed=1, last=0.12)]
    assert _row("collapses", runs[0]).endswith("| yes |")
    assert "0.05, 0.12 nats" in _row("collapses", *runs) and "| no |" in _row("collapses", *runs)
