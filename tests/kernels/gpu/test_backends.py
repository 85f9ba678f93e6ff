"""Both functions with Triton's kernels underneath: `chunked` as on a GPU, and `fused`.

In float32 and float16: Triton's interpreter multiplies bfloat16 tiles wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from aepo_kernels import backends, linear_logprob
from aepo_kernels.gpu import launch
from aepo_kernels.head import projection
from aepo_kernels.head.budget import Budget
from aepo_kernels.head.tokens import Tokens
from tests.kernels.gemm_units import counted
from tests.kernels.gpu_gemms import float16_as_on_a_gpu
from tests.kernels.head import test_float16, test_frozen, test_logprob, test_token_loss
from tests.kernels.head.test_token_loss import grpo_like, make_columns, policy_gradient
from tests.kernels.oracle import IGNORED, OPTIONS, Case, make_case, output_weights

triton_rows = pytest.importorskip("aepo_kernels.gpu.rows", reason="needs triton")
triton_fused = pytest.importorskip("aepo_kernels.gpu.fused", reason="needs triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu covers it there")

BACKENDS = ["chunked", "fused"]


@pytest.fixture(autouse=True)
def _triton_rows_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    calls = []

    def row_operations(hidden: torch.Tensor) -> object:
        calls.append(hidden.shape)
        return triton_rows

    monkeypatch.setattr(backends, "row_operations", row_operations)
    yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_logprob_matches_float64(option: str, backend: str) -> None:
    case = make_case(40, 24, 300, option=option)
    test_logprob.check(case, output_weights(40), backend=backend, chunk_tokens=16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8, 30), (1, 20, 65), (67, 33, 1001)], ids=str)
def test_logprob_at_ragged_shapes(shape: tuple[int, int, int], backend: str) -> None:
    case = make_case(*shape, option="all")
    test_logprob.check(case, output_weights(shape[0]), backend=backend, chunk_tokens=None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", test_frozen.NAMES)
def test_a_frozen_head_matches_float64(name: str, backend: str) -> None:
    case = make_case(40, 24, 300, option="all")
    with counted(test_frozen.active(case), 24, 300) as count:
        test_frozen.check(case, name, backend=backend, chunk_tokens=16, grad_of=(name,))
    # The fused forward pass is a kernel of its own, and backward makes the logits.
    assert count.total == pytest.approx(2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", ["plain", "second", "all", "shift_up", "shift_down"])
def test_token_loss_matches_float64(option: str, backend: str) -> None:
    test_token_loss.test_matches_float64((70, 40, 600), option, torch.float32, backend)


@pytest.mark.parametrize("scale", [1e-6, 30.0])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", ["plain", "all"])
def test_float16_matches_float64(option: str, backend: str, scale: float) -> None:
    with float16_as_on_a_gpu():
        test_float16.test_logprob_matches_float64(option, backend, scale)


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_no_token_that_counts_gives_a_connected_zero(num_tokens: int) -> None:
    test_token_loss.test_no_token_that_counts_gives_a_connected_zero(num_tokens, "fused")


def test_fused_reads_transposed_and_sliced_operands_as_they_are() -> None:
    case = make_case(30, 24, 200)
    wide = torch.full((30, 40), float("nan"))
    wide[:, 3:27] = case.hidden
    sliced = replace(case, hidden=wide[:, 3:27], weight=case.weight.T.contiguous().T)
    expected = run(case)
    assert all(torch.equal(a, b) for a, b in zip(run(sliced), expected, strict=True))


def run(case: Case) -> list[torch.Tensor]:
    output = linear_logprob(case.hidden, case.weight, case.targets, backend="fused")
    return [output.logprob, output.entropy, output.lse]


@pytest.mark.parametrize("hidden_size", [32, 20])
def test_the_copy_engine_loads_the_same_tiles(
    hidden_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(70, hidden_size, 333)
    expected = run(case)
    table = {80: launch.FUSED_FLOAT32_LAUNCH[80]._replace(tma=True)}
    monkeypatch.setattr(launch, "FUSED_FLOAT32_LAUNCH", table)
    descriptors = []
    original = triton_fused.TensorDescriptor.from_tensor
    monkeypatch.setattr(
        triton_fused.TensorDescriptor,
        "from_tensor",
        lambda *args: descriptors.append(args[1]) or original(*args),
    )
    for ours, theirs in zip(run(case), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert [list(block) for block in descriptors] == [[64, 16], [64, 16]]


@pytest.mark.parametrize("vocab", [333, 60, 1])
def test_halves_of_tiles_give_the_same(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(70, 20, vocab, option="all")
    outputs = []
    for split in (False, True):
        table = {80: launch.FUSED_FLOAT32_LAUNCH[80]._replace(split=split)}
        monkeypatch.setattr(launch, "FUSED_FLOAT32_LAUNCH", table)
        outputs.append(test_logprob.run(case, backend="fused"))
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fused_leaves_out_rows_without_a_coefficient() -> None:
    case = make_case(60, 16, 200, option="ignored")
    advantage = torch.randn(60)
    advantage[::2] = 0.0
    whole, fused = case.fresh(), case.fresh()
    test_token_loss.run(whole, policy_gradient, advantage).loss.backward()
    output = test_token_loss.run(fused, policy_gradient, advantage, backend="fused")
    output.loss.backward()
    assert output.active_rows == ((advantage != 0) & (case.targets != IGNORED)).sum()
    for one, other in zip(whole.tensors(), fused.tensors(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)


def test_fused_never_has_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    raw_logits = projection.Head.raw_logits

    def watched(self: projection.Head, tokens: Tokens, *space: torch.Tensor) -> torch.Tensor:
        sizes.append(len(tokens.targets))
        return raw_logits(self, tokens)

    monkeypatch.setattr(projection.Head, "raw_logits", watched)
    case = make_case(60, 16, 200)
    columns = make_columns(case)
    with torch.no_grad():
        test_token_loss.run(case, grpo_like, *columns, backend="fused", chunk_tokens=25)
    assert sizes == []
    leaves = case.fresh()
    test_token_loss.run(leaves, grpo_like, *columns, backend="fused", chunk_tokens=25)
    assert sum(sizes) <= 60 and max(sizes) <= 25


def test_chunks_of_a_later_part_of_the_forward_pass_are_its_own() -> None:
    # In the backward pass, which makes logits again for fewer tokens than went forward at once.
    budget = Budget(fused_forward_tokens=40)
    case, advantage = make_case(90, 16, 200), torch.randn(90)
    whole, fused = case.fresh(), case.fresh()
    test_token_loss.run(whole, policy_gradient, advantage).loss.backward()
    output = test_token_loss.run(
        fused, policy_gradient, advantage, backend="fused", budget=budget, chunk_tokens=16
    )
    output.loss.backward()
    for one, other in zip(whole.tensors(), fused.tensors(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_that_is_not_contiguous(backend: str) -> None:
    case = make_case(40, 24, 300, option="bias")
    assert case.bias is not None
    apart = torch.stack([torch.randn(300), case.bias], 1)[:, 1]
    assert not apart.is_contiguous()
    odd = replace(case, bias=apart)
    test_logprob.check(odd, output_weights(40), backend=backend, chunk_tokens=16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_temperature_may_be_a_number_of_numpy(backend: str) -> None:
    case = make_case(10, 24, 300)
    given = case.hidden, case.weight, case.targets
    one, other = (
        linear_logprob(*given, temperature=number, backend=backend)
        for number in (np.float32(0.5), 0.5)
    )
    assert torch.equal(one.logprob, other.logprob)
