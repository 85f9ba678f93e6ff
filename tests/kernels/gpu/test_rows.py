"""Triton's row kernels against the torch row operations in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aepo_kernels.rows import torch_rows
from aepo_kernels.rows.interface import LogitMap, RowCoefs, RowStats
from tests.kernels.oracle import assert_as_accurate

triton_rows = pytest.importorskip("aepo_kernels.gpu.rows", reason="needs triton")

OPTIONS = ("plain", "scalar", "token", "bias", "softcap", "all")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(num_rows: int, vocab: int, option: str, *, shift: float = 0.0) -> dict[str, Any]:
    """Arguments of row_stats: the named option alone, or every one together."""
    rng = torch.Generator().manual_seed(num_rows + vocab)
    inverse: float | Tensor = 1.0
    second: float | Tensor | None = None
    logit_map = LogitMap(None, None, 1.0)
    if option == "scalar":
        inverse, second = 1.4, 0.8
    if option in ("token", "all"):
        inverse = torch.rand(num_rows, generator=rng).to(DEVICE) + 0.5
        second = torch.rand(num_rows, generator=rng).to(DEVICE) + 0.5
    if option in ("bias", "all"):
        logit_map = replace(logit_map, bias=torch.randn(vocab, generator=rng).to(DEVICE))
    if option in ("softcap", "all"):
        logit_map = replace(logit_map, softcap=5.0, scale=-0.6)
    raw_logits = 3 * torch.randn(num_rows, vocab, generator=rng) + shift
    return {
        "raw_logits": raw_logits.to(DEVICE),
        "targets": torch.randint(vocab, (num_rows,), generator=rng).to(DEVICE),
        "inv_temperature": inverse,
        "second_inv_temperature": second,
        "logit_map": logit_map,
    }


def wide(case: dict[str, Any]) -> dict[str, Any]:
    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floating else value

    logit_map = replace(case["logit_map"], bias=cast(case["logit_map"].bias))
    return {**{name: cast(value) for name, value in case.items()}, "logit_map": logit_map}


def all_coefs(num_rows: int, second: bool) -> RowCoefs:
    rng = torch.Generator().manual_seed(9)
    first = [torch.randn(num_rows, generator=rng).to(DEVICE) for _ in range(4)]
    return RowCoefs(*first[:3], first[3] if second else None)


def check_stats(case: dict[str, Any]) -> None:
    truth = torch_rows.row_stats(**wide(case), dtype=torch.float64, logit_stats=True)
    base = torch_rows.row_stats(**case, dtype=torch.float32, logit_stats=True)
    actual = triton_rows.row_stats(**case, dtype=torch.float32, logit_stats=True)
    for name, ours, theirs, exact in zip(RowStats._fields, actual, base, truth, strict=True):
        assert (ours is None) == (exact is None), name
        if ours is not None:
            assert_as_accurate(ours, theirs, exact, name)


def grads(module: Any, case: dict[str, Any], coefs: RowCoefs, dtype: torch.dtype) -> list[Tensor]:
    stats = module.row_stats(**case, dtype=dtype)
    out = torch.full_like(case["raw_logits"], float("nan"))
    bias = case["logit_map"].bias
    bias_grad = None if bias is None else torch.ones_like(bias)
    module.row_grad(**case, stats=stats, coefs=coefs, out=out, bias_grad=bias_grad)
    return [out] if bias_grad is None else [out, bias_grad]


def check_grads(case: dict[str, Any], coefs: RowCoefs) -> None:
    exact_coefs = RowCoefs(*(None if x is None else x.double() for x in coefs))
    truth = grads(torch_rows, wide(case), exact_coefs, torch.float64)
    base = grads(torch_rows, case, coefs, torch.float32)
    actual = grads(triton_rows, case, coefs, torch.float32)
    for what, ours, theirs, exact in zip(("logits", "bias"), actual, base, truth, strict=False):
        assert_as_accurate(ours, theirs, exact, f"gradient of {what}")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2048), (2, 5001), (70, 130)], ids=str)
def test_statistics_and_gradients_match_float64(shape: tuple[int, int], option: str) -> None:
    case = make(*shape, option)
    check_stats(case)
    check_grads(case, all_coefs(shape[0], case["second_inv_temperature"] is not None))


@pytest.mark.parametrize("shift", [200.0, -200.0, -3e4])
def test_shifted_logits(shift: float) -> None:
    check_stats(make(3, 3000, "scalar", shift=shift))
    check_grads(make(3, 3000, "scalar", shift=shift), all_coefs(3, True))


@pytest.mark.parametrize("kept", range(4), ids=RowCoefs._fields)
def test_each_coefficient_alone(kept: int) -> None:
    coefs = [x if k == kept else None for k, x in enumerate(all_coefs(5, True))]
    check_grads(make(5, 300, "all"), RowCoefs(*coefs))


def test_gradients_in_place_and_from_strided_arguments() -> None:
    case = make(6, 300, "token")
    wider = torch.full((6, 320), float("nan"), device=DEVICE)
    wider[:, :300] = case["raw_logits"]
    strided = {**case, "raw_logits": wider[:, :300], "targets": case["targets"].repeat(2)[::2]}
    case["targets"] = strided["targets"].clone()
    coefs = RowCoefs(torch.full((), 0.5, device=DEVICE).expand(6), None, None, None)
    expected = grads(triton_rows, case, coefs, torch.float32)[0]
    stats = triton_rows.row_stats(**strided, dtype=torch.float32)
    triton_rows.row_grad(
        **strided, stats=stats, coefs=coefs, out=strided["raw_logits"], bias_grad=None
    )
    assert torch.equal(strided["raw_logits"], expected)
    assert wider[:, 300:].isnan().all()


def test_columns_at_minus_infinity_have_no_mass() -> None:
    case = make(4, 2100, "scalar")
    case["raw_logits"][:, :2048] = float("-inf")  # a whole block of columns
    case["targets"] = torch.tensor([2050, 2051, 2099, 3], device=DEVICE)
    alone = {**case, "raw_logits": case["raw_logits"][:, 2048:].contiguous()}
    alone["targets"] = (case["targets"] - 2048).clamp(min=0)
    actual = triton_rows.row_stats(**case, dtype=torch.float32)
    expected = triton_rows.row_stats(**alone, dtype=torch.float32)
    torch.testing.assert_close(actual.entropy, expected.entropy)
    torch.testing.assert_close(actual.logprob[:3], expected.logprob[:3])
    assert actual.logprob[3] == float("-inf")
    dlogits = grads(triton_rows, case, all_coefs(4, True), torch.float32)[0]
    assert (dlogits[:3, :2048] == 0).all() and dlogits.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_spoils_its_row_alone(bad: float) -> None:
    case = make(3, 5000, "plain")
    case["raw_logits"][1, 4444] = bad
    stats = triton_rows.row_stats(**case, dtype=torch.float32)
    for values in (stats.logprob, stats.entropy):
        assert values.isnan().tolist() == [False, True, False]


def test_a_row_without_any_finite_logit_is_nan() -> None:
    case = make(2, 100, "scalar")
    case["raw_logits"][0] = float("-inf")
    stats = triton_rows.row_stats(**case, dtype=torch.float32)
    for values in (stats.logprob, stats.entropy, stats.second_logprob):
        assert values is not None and values.isnan().tolist() == [True, False]


def test_a_target_outside_the_vocabulary_is_nan_and_not_a_stray_read() -> None:
    case = make(3, 100, "bias")
    case["targets"] = torch.tensor([100, -1, 5], device=DEVICE)
    stats = triton_rows.row_stats(**case, dtype=torch.float32)
    assert stats.logprob.isnan().tolist() == [True, True, False]
    assert stats.entropy.isfinite().all()


def test_no_rows() -> None:
    case = make(0, 100, "all")
    stats = triton_rows.row_stats(**case, dtype=torch.float32)
    assert [len(x) for x in stats[:6]] == [0] * 6
    bias_grad = torch.zeros(100, device=DEVICE)
    out = torch.empty(0, 100, device=DEVICE)
    triton_rows.row_grad(
        **case, stats=stats, coefs=all_coefs(0, True), out=out, bias_grad=bias_grad
    )
    assert (bias_grad == 0).all()


def test_bfloat16_logits_are_read_as_they_are() -> None:
    case = make(4, 3000, "all")
    case["raw_logits"] = case["raw_logits"].bfloat16()
    truth = torch_rows.row_stats(**wide(case), dtype=torch.float64)
    actual = triton_rows.row_stats(**case, dtype=torch.float32)
    for ours, exact in zip(actual[:6], truth[:6], strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=3e-6)
