"""Runs of several processes end with the weights of the run of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.aepo_fast.world.ranks import run_ranks
from tests.aepo_fast.world.runs import lines_of, run_config, train_each, untied, weights_of

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "aepo": {},
    "gspo": {"loss": {"policy": "gspo"}, "aepo": {"enabled": False}},
}


def test_two(tiny_model_dir: Path, tmp_path: Path) -> None:
    runs = {
        name: [run_config(tiny_model_dir, tmp_path / name / who, changes) for who in ("one", "two")]
        for name, changes in VARIANTS.items()
    }
    run_ranks("tests.aepo_fast.world.runs:train_each", 2, tmp_path, [b for _, b in runs.values()])
    assert train_each([one for one, _ in runs.values()]) == [0] * len(runs)
    for name, (one, two) in runs.items():
        for ours, theirs in zip(lines_of(one), lines_of(two), strict=True):
            print(name, ours["step"], ours["loss"], theirs["loss"], ours["grad_norm"], theirs["grad_norm"])
        ours, theirs = weights_of(one), weights_of(two)
        assert ours.keys() == theirs.keys()
        for key in ours:
            print(key, (ours[key] - theirs[key]).abs().max().item())
