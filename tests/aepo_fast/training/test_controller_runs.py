"""Whole runs of the tiny model under each entropy controller: resume, and what is logged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aepo_fast.config.method import AepoConfig
from aepo_fast.config.sections import CheckpointConfig, RolloutConfig
from aepo_fast.training.run import train
from tests.aepo_fast.training.test_run import assert_same_end, metrics_of
from tests.tiny_run import copy_until, explained_metrics, tiny_config

# The tiny model's entropy falls from 5.7 nats to 5.2: T has to move at once.
RUNS: dict[str, dict[str, Any]] = {
    "observer": {"aepo": AepoConfig(controller="observer", entropy_target=6.0)},
    "pi": {"aepo": AepoConfig(controller="pi", entropy_target=6.0)},
    "published": {"aepo": AepoConfig(controller="published", alpha=0.5, entropy_target=6.0)},
    "switch": {"aepo": AepoConfig(controller="switch", alpha=0.5, entropy_target=5.65)},
    "ahead": {
        "aepo": AepoConfig(controller="observer", entropy_target=6.0),
        "rollout": RolloutConfig(max_new_tokens=6, dtype="bfloat16", steps_ahead=1),
    },
}


@pytest.mark.parametrize("name", list(RUNS))
def test_three_steps_resumed_for_three_more_equal_six(
    tiny_model_dir: Path, tmp_path: Path, name: str
) -> None:
    straight = tiny_config(tiny_model_dir, tmp_path / "straight", **RUNS[name])
    straight = replace(
        straight,
        trainer=replace(straight.trainer, steps=6),
        checkpoint=CheckpointConfig(every=1, keep=6),
    )
    halves = replace(straight, output_dir=str(tmp_path / "halves"))
    assert train(straight) == 0
    copy_until(3, straight, halves)
    assert len(metrics_of(halves)) == 6  # as after a kill: lines beyond the checkpoint go
    assert train(halves, resume=True) == 0
    assert_same_end(straight, halves)
    lines = metrics_of(straight)
    temperatures = [line["aepo/temperature"] for line in lines]
    assert temperatures[0] == 1.0 and len(set(temperatures)) > 1
    observed = straight.aepo.controller == "observer"
    for line in lines:
        assert line["entropy_stderr"] > 0
        assert line.keys() - {"step"} <= explained_metrics()
        assert ("aepo/response" in line) == ("aepo/response_error" in line) == observed
        if observed and line["step"] == 1:
            assert line["aepo/response"] is None  # not known yet
