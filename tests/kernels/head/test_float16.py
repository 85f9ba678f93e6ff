"""float16 operands: float32 statistics, and gradients that tiny coefficients do not empty."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from aepo_kernels import RowSampling, linear_logprob, linear_token_loss
from aepo_kernels.head.budget import Budget
from aepo_kernels.head.gradient_scale import gradient_scale
from aepo_kernels.head.plan import make_plan
from aepo_kernels.head.projection import head_of
from aepo_kernels.head.tokens import tokens_of
from aepo_kernels.problem import Problem
from aepo_kernels.rows.interface import RowCoefs
from tests.kernels.budgets import token_loss_within
from tests.kernels.gpu_gemms import float16_as_on_a_gpu
from tests.kernels.oracle import OPTIONS, Case, make_case, materialised, output_weights

FLOAT16, UNIT = torch.float16, 2.0**-11
BACKENDS = ["chunked", "reference"]


@pytest.fixture(autouse=True, params=["cpu", "gpu"])
def device_kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """GEMMs of a CPU, which upcast, and those of a GPU, which write float16."""
    if request.param == "cpu":
        yield "cpu"
        return
    with float16_as_on_a_gpu():
        yield "gpu"


def half(option: str = "plain", count: int = 127, vocab: int = 1000) -> tuple[Case, Case]:
    """A case in float16, and the same numbers in float64."""
    case = make_case(count, 64, vocab, dtype=FLOAT16, option=option)
    return case.fresh(), case.fresh(torch.float64)


def near(found: Tensor, wanted: Tensor, what: str, unit: float = UNIT) -> None:
    """Off by a few roundings, in the norm; of float16 numbers also by half of the smallest one."""
    error = torch.linalg.vector_norm(found.double() - wanted).item()
    size = torch.linalg.vector_norm(wanted).item()
    least = 2.0**-25 * wanted.numel() ** 0.5 if found.dtype == FLOAT16 else 0.0
    assert error <= 2 * unit * size + least, f"{what}: {error:.3g} of {size:.3g}"


@pytest.mark.parametrize("scale", [1e-6, 1.0, 30.0], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_logprob_matches_float64(option: str, backend: str, scale: float) -> None:
    ours, exact = half(option)
    # Leaves of float32 show what float16 leaves could not hold.
    wide = [x.detach().float().requires_grad_() for x in ours.tensors()[1:]]
    options = ours.options | {"backend": backend, "bias": wide[1] if len(wide) > 1 else None}
    outputs = linear_logprob(ours.hidden, wide[0], ours.targets, **options)[:4]
    wanted, shifted = materialised(exact), "shift" in option
    for one, other, name in zip(outputs, wanted, ("lp", "entropy", "lse", "second"), strict=True):
        assert (one is None) == (other is None)
        if isinstance(one, Tensor) and other is not None:
            assert one.dtype == torch.float32
            # A logit of 200 is off by up to 0.0625.
            near(one.detach(), other.detach(), name, UNIT * (60 if shifted else 1))
    grads = []
    for leaves, found in (([ours.hidden, *wide], outputs), (exact.tensors(), wanted)):
        pairs = zip(output_weights(127), found, strict=True)
        terms = [(w * scale * x).sum() for w, x in pairs if x is not None]
        grads.append(torch.autograd.grad(torch.stack(terms).sum(), leaves))
    for one, other in zip(*grads, strict=True):
        near(one, other, "gradient", UNIT * (100 if shifted else 1))


def policy_gradient(
    logprob: Tensor, entropy: Tensor, second: Tensor | None, advantage: Tensor
) -> Tensor:
    return -(logprob * advantage).sum() - 0.1 * (entropy * advantage).sum()


@pytest.mark.parametrize("weight_dtype", [FLOAT16, torch.float32], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1.0, 1e4], ids=str)
def test_a_token_loss_keeps_what_a_loss_scale_lifts(
    size: float, lora: bool, weight_dtype: torch.dtype
) -> None:
    ours, exact = half("bias")
    weight = ours.weight.detach().to(weight_dtype).requires_grad_()
    rng = torch.Generator().manual_seed(3)
    low = [torch.randn(4, 64, generator=rng) / 8, torch.randn(1000, 4, generator=rng)]
    low = [x.half() for x in low]
    low_leaves = [[x.to(t).requires_grad_() for x in low] for t in (FLOAT16, torch.float64)]
    advantage = torch.randn(127, generator=rng) * size
    options: dict[str, Any] = {"bias": ours.bias}
    if lora:
        options |= {"lora_a": low_leaves[0][0], "lora_b": low_leaves[0][1], "lora_scale": 0.5}
    small = Budget(chunk_bytes=2**23 + 40 * 4 * 1000)
    output = token_loss_within(
        small, ours.hidden, weight, ours.targets, policy_gradient, advantage, **options
    )
    leaves = [ours.hidden, weight, ours.bias, *(low_leaves[0] if lora else [])]
    grads = torch.autograd.grad(output.loss * (1 / size), leaves)  # type: ignore[arg-type]

    logits = exact.hidden @ exact.weight.T + exact.bias
    if lora:
        logits = logits + 0.5 * exact.hidden @ low_leaves[1][0].T @ low_leaves[1][1].T
    logp = torch.log_softmax(logits, 1)
    vectors = logp.gather(1, exact.targets[:, None])[:, 0], torch.special.entr(logp.exp()).sum(1)
    wanted = policy_gradient(*vectors, None, advantage.double())
    near(output.loss.detach(), wanted.detach(), "loss")
    leaves = [exact.hidden, exact.weight, exact.bias, *(low_leaves[1] if lora else [])]
    expected = torch.autograd.grad(wanted / size, leaves)  # type: ignore[arg-type]
    for one, other in zip(grads, expected, strict=True):
        near(one, other, "gradient", 1.5 * UNIT)


def test_a_buffer_gets_what_float16_cannot_hold() -> None:
    ours, exact = half()
    advantage = torch.linspace(-1, 1, 127) * 1e-9
    buffer = torch.zeros(ours.weight.shape)
    given = ours.hidden, ours.weight, ours.targets, policy_gradient, advantage
    linear_token_loss(*given, weight_grad=buffer, chunk_tokens=50).loss.backward()
    logp = torch.log_softmax(exact.hidden @ exact.weight.T, 1)
    vectors = logp.gather(1, exact.targets[:, None])[:, 0], torch.special.entr(logp.exp()).sum(1)
    policy_gradient(*vectors, None, advantage.double()).backward()
    assert exact.weight.grad is not None and ours.weight.grad is None
    near(buffer, exact.weight.grad, "weight_grad")


def test_tokens_of_very_different_weight_share_a_chunk() -> None:
    ours, exact = half()
    advantage = torch.logspace(-4, 4, 127)
    given = ours.hidden, ours.weight, ours.targets, policy_gradient, advantage
    output = linear_token_loss(*given)
    (found,) = torch.autograd.grad(output.loss, ours.hidden)
    logp = torch.log_softmax(exact.hidden @ exact.weight.T, 1)
    vectors = logp.gather(1, exact.targets[:, None])[:, 0], torch.special.entr(logp.exp()).sum(1)
    loss = policy_gradient(*vectors, None, advantage.double())
    (wanted,) = torch.autograd.grad(loss, exact.hidden)
    for row, (one, other) in enumerate(zip(found, wanted, strict=True)):
        near(one, other, f"row {row}", 4 * UNIT)


def test_sampled_rows_have_the_variance_of_unscaled_gradients() -> None:
    found = []
    for dtype in (FLOAT16, torch.float32):
        case = make_case(127, 64, 1000, dtype=FLOAT16).fresh(dtype)
        how = RowSampling(1e-5, torch.Generator().manual_seed(1))
        advantage = torch.linspace(-1, 1, 127) * 1e-5
        given = case.hidden, case.weight, case.targets, policy_gradient, advantage
        output = linear_token_loss(*given, row_sampling=how)
        found.append(output.metrics["row_sampling/variance"].double())
    near(found[0], found[1], "variance", 2 * UNIT)


def test_the_scale_is_the_largest_power_of_two_that_fits() -> None:
    case = make_case(40, 16, 50, dtype=FLOAT16)
    problem = Problem(case.hidden, case.weight, case.targets)
    head, tokens = head_of(problem, make_plan(problem)), tokens_of(problem)
    stats = head.forward(tokens)[1]
    zero = torch.zeros(40)
    for size in (1e-25, 1e-6, 1.0, 3e5):
        coef = zero.clone()
        coef[3] = size
        scale = gradient_scale(head, tokens, stats, RowCoefs(coef, None, None, None)).item()
        assert 2.0**14 <= scale * size <= 2.0**15 and torch.frexp(torch.tensor(scale))[0] == 0.5
    coef[5] = torch.inf
    again = gradient_scale(head, tokens, stats, RowCoefs(coef, None, None, None)).item()
    assert again == scale
    assert gradient_scale(head, tokens, stats, RowCoefs(zero, None, None, None)).isfinite()


def test_a_bad_row_spoils_no_other_row() -> None:
    ours, _ = half()
    with torch.no_grad():
        ours.hidden[7] = torch.inf
    output = linear_logprob(ours.hidden, ours.weight, ours.targets)
    (found,) = torch.autograd.grad(output.logprob.sum(), ours.hidden)
    others = torch.arange(127) != 7
    assert found[others].isfinite().all() and found[others].any()


@pytest.mark.parametrize("wide", [False, True])
def test_slices_are_refused(wide: bool) -> None:
    ours, _ = half()
    hidden = ours.hidden.float() if wide else ours.hidden
    with pytest.raises(ValueError, match="weight_slice = 64: writes float16 gradients"):
        linear_logprob(hidden, ours.weight, ours.targets, weight_slice=64)


def test_float32_logits_are_allowed() -> None:
    ours, exact = half("shift_up")
    found = linear_logprob(ours.hidden, ours.weight, ours.targets, logits_dtype=torch.float32)
    wanted = materialised(exact)[0]
    assert wanted is not None
    near(found.logprob.detach(), wanted.detach(), "logprob", 1e-4)
