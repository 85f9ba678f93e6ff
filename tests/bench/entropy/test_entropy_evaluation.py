"""The benchmark's evaluation of a policy goes through the rollout engine that is configured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import RolloutConfig
from bench.entropy.evaluation import evaluate_run
from tests.aepo_fast.rollout import fake_vllm
from tests.tiny_run import tiny_config


def test_it_samples_with_the_engine_that_is_configured(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.install(monkeypatch)
    rollout = RolloutConfig("vllm", max_new_tokens=5, dtype="float32", allow_untested_vllm=True)
    cfg = tiny_config(tiny_model_dir, tmp_path, rollout=rollout)
    found = evaluate_run(str(tiny_model_dir), cfg, prompts=3, samples=2)
    assert (found["prompts"], found["samples"], found["mean_length"]) == (3, 2, 5)
    assert found["entropy"] == 1  # every log-prob of the stand-in is -1
    monkeypatch.delitem(sys.modules, "vllm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        evaluate_run("no-such-folder", cfg, prompts=3, samples=2)
