"""The sum of squared probabilities, from every row operation."""

from __future__ import annotations

import pytest
import torch

from aepo_kernels import backends, linear_logprob
from aepo_kernels.rows import torch_rows
from tests.kernels.oracle import IGNORED, Case, make_case


def truth_of(case: Case) -> torch.Tensor:
    wide = case.fresh(torch.float64)
    logits = wide.hidden @ wide.weight.T
    if wide.bias is not None:
        logits = logits + wide.bias
    logits = logits * case.options.get("logit_scale", 1.0)
    cap = case.options.get("softcap")
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    temperature = torch.as_tensor(case.options.get("temperature", 1.0), dtype=torch.float64)
    distribution = torch.softmax(logits / temperature.reshape(-1, 1), 1)
    return distribution.square().sum(1).where(case.targets != IGNORED, 0.0)


@pytest.mark.parametrize("kind", ["reference", "chunked", "triton rows", "fused"])
@pytest.mark.parametrize("option", ["plain", "second", "all", "shift_down"])
def test_matches_float64(option: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind in ("triton rows", "fused"):
        module = pytest.importorskip("aepo_kernels.gpu.rows", reason="needs triton")
        if torch.cuda.is_available():
            pytest.skip("on a GPU these kernels take its tensors alone")
        monkeypatch.setattr(
            backends, "row_operations", lambda _: module if kind == "triton rows" else torch_rows
        )
    case = make_case(40, 16, 300, option=option)
    case = case.fresh()
    output = linear_logprob(
        case.hidden,
        case.weight,
        case.targets,
        **case.keywords(),
        sum_squares=True,
        backend="chunked" if kind == "triton rows" else kind,
        chunk_tokens=15,
    )
    assert output.sum_squares is not None and not output.sum_squares.requires_grad
    tolerance = 1e-4 if option.startswith("shift") else 1e-5
    torch.testing.assert_close(
        output.sum_squares.double(), truth_of(case), rtol=tolerance, atol=1e-7
    )
    output.logprob.sum().backward()
    assert case.hidden.grad is not None


def test_not_asked_for_it_is_none() -> None:
    case = make_case(5, 8, 30)
    assert linear_logprob(case.hidden, case.weight, case.targets).sum_squares is None


def test_no_tokens() -> None:
    case = make_case(0, 8, 30)
    output = linear_logprob(case.hidden, case.weight, case.targets, sum_squares=True)
    assert output.sum_squares is not None and output.sum_squares.shape == (0,)
