"""Which dtype "auto" is, and what the run says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import resolve_machine
from aepo_fast.config.sections import ModelConfig, RolloutConfig
from aepo_kernels import backends
from tests.tiny_run import tiny_config


@pytest.mark.parametrize(("has_instructions", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_what_the_processor_multiplies(
    has_instructions: bool, chosen: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(backends, "_cpu_multiplies_bfloat16", lambda: has_instructions)
    cfg = replace(tiny_config(tmp_path, tmp_path), model=ModelConfig("x"), rollout=RolloutConfig())
    machine = resolve_machine(cfg)
    found = machine.settled(cfg)
    assert (found.model.compute_dtype, found.rollout.dtype) == (chosen, chosen)
    assert resolve_machine(found) == machine and machine.settled(found) == found
    line = machine.describe()
    assert line.startswith(f"dtypes: weights float32, compute {chosen}, rollouts {chosen}")
    assert has_instructions != line.endswith("no bfloat16 instructions")


def test_a_named_dtype_stays_and_slow_gemms_are_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(backends, "_cpu_multiplies_bfloat16", lambda: False)
    named = ModelConfig("x", compute_dtype="bfloat16"), RolloutConfig(dtype="float32")
    cfg = replace(tiny_config(tmp_path, tmp_path), model=named[0], rollout=named[1])
    machine = resolve_machine(cfg)
    assert machine.settled(cfg) == cfg
    assert "bfloat16 GEMMs are slow" in machine.describe()


def test_what_only_samples_needs_no_head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    cfg = tiny_config(tmp_path, tmp_path)
    cfg = replace(cfg, model=replace(cfg.model, head_backend="fused"))
    assert resolve_machine(cfg, trains=False).rollout_dtype == torch.float32
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        resolve_machine(cfg)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ConfigError, match="head_backend"):
        resolve_machine(cfg)
