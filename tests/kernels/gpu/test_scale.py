"""Scaling a gradient by a factor on the device, in place or into another dtype."""

from __future__ import annotations

import pytest
import torch

triton_scale = pytest.importorskip("aepo_kernels.gpu.scale", reason="needs triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cuts bfloat16 off


@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0, float("nan")])
@pytest.mark.parametrize("size", [0, 1, 4096, 10_007])
def test_scales_every_element(size: int, factor: float) -> None:
    values = torch.randn(size, device=DEVICE)
    by = torch.tensor(factor, device=DEVICE)
    expected = values * by
    rounded = triton_scale.scale(values, by, HALF)
    torch.testing.assert_close(rounded, expected.to(HALF), rtol=0, atol=0, equal_nan=True)
    assert triton_scale.scale(values, by, torch.float32) is values
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


def test_more_elements_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_scale, "_PROGRAMS", 3)
    values = torch.randn(50_001, device=DEVICE)
    expected = values * 3.0
    by = torch.tensor(3.0, device=DEVICE)
    assert torch.equal(triton_scale.scale(values, by, HALF), expected.to(HALF))
    assert torch.equal(triton_scale.scale(values, by, torch.float32), expected)
