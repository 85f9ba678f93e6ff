"""Every option through the public functions, on each instruction set of the C++ rows."""

from __future__ import annotations

import pytest
import torch

from aepo_kernels import linear_logprob
from aepo_kernels.cpu.library import ISA_VARIABLE, instruction_sets
from tests.kernels.head import test_logprob, test_token_loss
from tests.kernels.oracle import OPTIONS, make_case, output_weights


@pytest.fixture(params=[*instruction_sets(), "torch"], autouse=True)
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    return request.param


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_logprob_matches_float64(option: str, dtype: torch.dtype) -> None:
    case = make_case(127, 64, 1000, dtype=dtype, option=option)
    test_logprob.check(case, output_weights(127), backend="chunked", chunk_tokens=50)


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_token_loss_matches_float64(option: str, dtype: torch.dtype) -> None:
    case = make_case(127, 64, 1000, dtype=dtype, option=option, seed=3)
    test_token_loss.check(case)


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 31, 50257])
def test_vocabularies_of_any_size(vocab: int, dtype: torch.dtype) -> None:
    case = make_case(9, 8, vocab, dtype=dtype, option="second")
    # No chunk of one token: over 50257 columns, some processors' float32 matrix-vector product is
    # five times as far off as the matrix product that the materialised path calls.
    test_logprob.check(case, output_weights(9), backend="chunked", chunk_tokens=5)


def test_results_say_which_rows_ran(rows: str) -> None:
    case = make_case(5, 8, 100)
    found = linear_logprob(case.hidden, case.weight, case.targets).row_kernels
    assert found == (f"torch ({ISA_VARIABLE} = torch)" if rows == "torch" else f"c++ ({rows})")
