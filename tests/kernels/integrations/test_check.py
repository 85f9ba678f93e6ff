"""`python -m aepo_kernels.integrations.check`: its table and its exit code."""

from __future__ import annotations

import pytest
import torch

from aepo_kernels.integrations import check, heads
from aepo_kernels.integrations.tiny_models import MODELS


def test_the_table_has_every_model_and_ours_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["model", "ours", "transformers"]
    assert [line[:22].strip() for line in lines[2 : 2 + len(MODELS)]] == list(MODELS)
    assert lines[-1] == "ours is right on all of them"


def test_a_head_that_is_off_gives_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heads, "_FACTORS", ())
    monkeypatch.setattr(check, "MODELS", {name: MODELS[name] for name in ("llama", "cohere")})
    assert check.main(["--ms"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "ours is off on cohere"


def test_half_precision_is_compared_with_its_own_rounding() -> None:
    found = check.compare("granite", torch.bfloat16, 1.0)
    assert not check.is_off(found, torch.bfloat16)
    own = found["ours"]
    assert isinstance(own, check.Errors) and own.logprob < 0.1
    assert isinstance(found["prime-rl"], str) and "prime_rl" in found["prime-rl"]
