"""Everything that only a GPU can show: `pytest -m gpu`.

With compute-sanitizer: `compute-sanitizer --tool memcheck python -m pytest -m gpu -k options`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aepo_kernels import linear_logprob, linear_token_loss
from tests.kernels.head import test_logprob
from tests.kernels.head.test_token_loss import by_autograd, grpo_like, make_columns
from tests.kernels.oracle import (
    OPTIONS,
    Case,
    assert_as_accurate,
    make_case,
    output_weights,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
BACKENDS = ["chunked", "fused"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _plain_float32_gemms() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def token_loss(case: Case, columns: tuple[Tensor, ...], **more: Any) -> list[Tensor]:
    """Loss, log-probs, entropies and gradients of one call."""
    leaves = case.fresh()
    output = linear_token_loss(
        leaves.hidden,
        leaves.weight,
        leaves.targets,
        grpo_like,
        *columns,
        **leaves.keywords(),
        **more,
    )
    grads = torch.autograd.grad(output.loss, leaves.tensors())
    return [output.loss.detach(), output.logprob, output.entropy, *grads]


def check_token_loss(case: Case, **more: Any) -> None:
    columns = tuple(column.to(DEVICE) for column in make_columns(case.to("cpu")))
    case = case.to(DEVICE)
    loss, _, truth = by_autograd(case.fresh(torch.float64), grpo_like, *columns)
    base_loss, _, base = by_autograd(case.fresh(), grpo_like, *columns)
    ours = token_loss(case, columns, **more)
    assert_as_accurate(ours[0], base_loss, loss, "loss")
    for index, (one, theirs, exact) in enumerate(zip(ours[3:], base, truth, strict=True)):
        assert_as_accurate(one, theirs, exact, f"gradient {index}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_logprob(option: str, dtype: torch.dtype, backend: str) -> None:
    case = make_case(127, 64, 1000, dtype=dtype, option=option).to(DEVICE)
    weights = [weight.to(DEVICE) for weight in output_weights(127)]
    test_logprob.check(case, weights, backend=backend, chunk_tokens=50)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_token_loss(option: str, dtype: torch.dtype, backend: str) -> None:
    case = make_case(127, 64, 1000, dtype=dtype, option=option, seed=3)
    check_token_loss(case, backend=backend, chunk_tokens=50)


@pytest.mark.parametrize("weight_slice", [300, 5000])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)  # float16 has no slices
def test_options_of_slices(dtype: torch.dtype, weight_slice: int) -> None:
    case = make_case(127, 64, 1000, dtype=dtype, option="all", seed=3)
    check_token_loss(case, weight_slice=weight_slice)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [(0, 64, 1000), (1, 896, 151936), (257, 896, 50257), (300, 1152, 262144), (512, 2048, 151936)],
    ids=str,
)
def test_real_sizes(shape: tuple[int, int, int], backend: str) -> None:
    case = make_case(*shape, dtype=torch.bfloat16, option="second").to(DEVICE)
    weights = [weight.to(DEVICE) for weight in output_weights(shape[0])]
    test_logprob.check(case, weights, backend=backend, chunk_tokens=None)


def test_float32_logits_round_less() -> None:
    case = make_case(200, 256, 5000, dtype=torch.bfloat16).to(DEVICE)
    truth = linear_logprob(
        case.hidden.double(), case.weight.double(), case.targets, backend="reference"
    )
    errors = []
    for dtype in (None, torch.float32):
        output = linear_logprob(case.hidden, case.weight, case.targets, logits_dtype=dtype)
        errors.append((output.logprob - truth.logprob).abs().max().item())
    assert errors[1] < errors[0] / 50
    check_token_loss(
        make_case(127, 64, 1000, dtype=torch.bfloat16), logits_dtype=torch.float32, chunk_tokens=50
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_logits_than_32_bits_count(backend: str) -> None:
    num_tokens, hidden_size, vocab = 16_384, 128, 151_936
    assert num_tokens * vocab > 2**31
    rng = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=rng, device=DEVICE).bfloat16()
    weight = torch.randn(vocab, hidden_size, generator=rng, device=DEVICE).bfloat16() / 8
    targets = torch.randint(vocab, (num_tokens,), generator=rng, device=DEVICE)
    options = {"backend": backend, "chunk_tokens": num_tokens}
    last = slice(-64, None)
    leaf = hidden.clone().requires_grad_()
    output = linear_logprob(leaf, weight, targets, **options)  # type: ignore[arg-type]
    output.logprob.sum().backward()
    few = hidden[last].clone().requires_grad_()
    expected = linear_logprob(few, weight, targets[last], **options)  # type: ignore[arg-type]
    expected.logprob.sum().backward()
    torch.testing.assert_close(output.logprob[last], expected.logprob, rtol=0, atol=0.05)
    torch.testing.assert_close(output.entropy[last], expected.entropy, rtol=0, atol=0.05)
    assert leaf.grad is not None and few.grad is not None
    torch.testing.assert_close(leaf.grad[last], few.grad, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bitwise_equal(backend: str) -> None:
    case = make_case(700, 256, 50257, dtype=torch.bfloat16, option="all")
    columns = tuple(column.to(DEVICE) for column in make_columns(case))
    case = case.to(DEVICE)
    first, second = (token_loss(case, columns, backend=backend, chunk_tokens=200) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_on_the_hot_path_waits_for_the_device(backend: str) -> None:
    case = make_case(600, 64, 1000, dtype=torch.bfloat16, option="token_second")
    columns = tuple(column.to(DEVICE) for column in make_columns(case))
    case = case.to(DEVICE)
    active = torch.arange(0, 600, 2, device=DEVICE)
    options = {"backend": backend, "ignore_index": None, "active": active, "chunk_tokens": 128}
    token_loss(case, columns, **options)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        token_loss(case, columns, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("options", "budget"), [({}, 1.5), ({"chunk_tokens": 1024}, 0.35)], ids=["default", "small"]
)
def test_peak_memory_is_within_the_plan(options: dict[str, Any], budget: float) -> None:
    num_tokens, hidden_size, vocab = 8192, 1024, 151_936
    rng = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=rng, device=DEVICE).bfloat16()
    weight = (torch.randn(vocab, hidden_size, generator=rng, device=DEVICE) / 16).bfloat16()
    targets = torch.randint(vocab, (num_tokens,), generator=rng, device=DEVICE)
    advantage = torch.randn(num_tokens, generator=rng, device=DEVICE)
    hidden.requires_grad_()
    weight.requires_grad_()

    def loss(logprob: Tensor, entropy: Tensor, second: Tensor | None, by: Tensor) -> Tensor:
        return -(by * logprob).sum()

    buffer = torch.zeros(vocab, hidden_size, device=DEVICE)  # its gradient is the caller's memory
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = linear_token_loss(
        hidden, weight, targets, loss, advantage, weight_grad=buffer, ignore_index=None, **options
    )
    output.loss.backward()
    torch.cuda.synchronize()
    gradient = hidden.numel() * hidden.element_size()
    extra = torch.cuda.max_memory_allocated() - before - gradient
    assert extra / 2**30 <= budget + 0.05


def test_the_copy_engine_and_pointers_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_fused = pytest.importorskip("aepo_kernels.gpu.fused")
    case = make_case(300, 512, 5000, dtype=torch.bfloat16).to(DEVICE)
    outputs = []
    for copy_engine in (True, False):
        if not copy_engine:
            monkeypatch.setattr(triton_fused, "_fits_tma", lambda _: False)
        output = linear_logprob(case.hidden, case.weight, case.targets, backend="fused")
        outputs.append(output.logprob)
    torch.testing.assert_close(*outputs)


def test_inductor_takes_the_whole_graph() -> None:
    case = make_case(100, 64, 1000, dtype=torch.bfloat16).to(DEVICE)

    @torch.compile(fullgraph=True)
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        output = linear_logprob(hidden * 2, weight, case.targets, temperature=0.7)
        return (output.logprob - 0.1 * output.entropy).sum()

    compiled, eager = case.fresh(), case.fresh()
    loss(compiled.hidden, compiled.weight).backward()
    output = linear_logprob(eager.hidden * 2, eager.weight, case.targets, temperature=0.7)
    (output.logprob - 0.1 * output.entropy).sum().backward()
    assert compiled.hidden.grad is not None and eager.hidden.grad is not None
    assert torch.equal(compiled.hidden.grad, eager.hidden.grad)
