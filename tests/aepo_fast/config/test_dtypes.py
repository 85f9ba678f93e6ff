"""Which dtype "auto" is, and what the run says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from aepo_fast.config.resolve import choose_dtypes, describe_dtypes
from aepo_fast.config.sections import ModelConfig, RolloutConfig
from aepo_kernels import backends
from tests.tiny_run import tiny_config


@pytest.mark.parametrize(("has_instructions", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_what_the_processor_multiplies(
    has_instructions: bool, chosen: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(backends, "_cpu_multiplies_bfloat16", lambda: has_instructions)
    cfg = replace(tiny_config(tmp_path, tmp_path), model=ModelConfig("x"), rollout=RolloutConfig())
    found = choose_dtypes(cfg)
    assert (found.model.compute_dtype, found.rollout.dtype) == (chosen, chosen)
    assert choose_dtypes(found) == found
    line = describe_dtypes(found)
    assert line.startswith(f"dtypes: weights float32, compute {chosen}, rollouts {chosen}")
    assert has_instructions != line.endswith("no bfloat16 instructions")


def test_a_named_dtype_stays_and_slow_gemms_are_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(backends, "_cpu_multiplies_bfloat16", lambda: False)
    named = ModelConfig("x", compute_dtype="bfloat16"), RolloutConfig(dtype="float32")
    cfg = replace(tiny_config(tmp_path, tmp_path), model=named[0], rollout=named[1])
    assert choose_dtypes(cfg) == cfg
    assert "bfloat16 GEMMs are slow" in describe_dtypes(cfg)
