"""linear_logprob against float64 autograd over materialised logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aepo_kernels import linear_logprob
from tests.kernels.oracle import (
    OPTIONS,
    Case,
    assert_as_accurate,
    make_case,
    materialised,
    output_weights,
    weighted_gradients,
)

DTYPES = [torch.float32, torch.bfloat16]
# Every N in 0, 1, 127, 1388, V in 1000, 32000, 50257 and H in 64, 576, 896; never all large.
SHAPES = [
    (0, 64, 1000),
    (1, 576, 50257),
    (1, 896, 32000),
    (127, 64, 50257),
    (127, 896, 1000),
    (1388, 576, 1000),
]
NAMES = ("logprob", "entropy", "lse", "second_logprob")


def run(case: Case, *, backend: str = "chunked", chunk_tokens: int | None = 100) -> list:
    output = linear_logprob(
        case.hidden,
        case.weight,
        case.targets,
        **case.keywords(),
        backend=backend,
        chunk_tokens=chunk_tokens,
    )
    return list(output[:4])


def check(case: Case, weights: list, *, backend: str, chunk_tokens: int | None = 100) -> None:
    results: dict[str, tuple[list, list[Tensor]]] = {}
    for name, dtype in (("truth", torch.float64), ("baseline", None), ("actual", None)):
        leaves = case.fresh(dtype)
        if name == "actual":
            outputs = run(leaves, backend=backend, chunk_tokens=chunk_tokens)
        else:
            outputs = materialised(leaves)
        results[name] = outputs, weighted_gradients(leaves, outputs, weights)
    (truth, truth_grads), (base, base_grads), (actual, grads) = results.values()
    for what, ours, theirs, exact in zip(NAMES, actual, base, truth, strict=True):
        assert (ours is None) == (exact is None), what
        if ours is not None:
            assert ours.dtype == torch.float32
            assert_as_accurate(ours, theirs, exact, what)
    for what, ours, theirs, exact, tensor in zip(
        ("hidden", "weight", "bias"), grads, base_grads, truth_grads, case.tensors(), strict=False
    ):
        assert ours.dtype == tensor.dtype
        assert_as_accurate(ours, theirs, exact, f"gradient of {what}")


@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64_at_ragged_shapes(shape: tuple, dtype: torch.dtype, option: str) -> None:
    case = make_case(*shape, dtype=dtype, option=option)
    check(case, output_weights(shape[0]), backend="chunked", chunk_tokens=None)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_matches_float64(option: str, dtype: torch.dtype, backend: str) -> None:
    case = make_case(127, 64, 1000, dtype=dtype, option=option)
    check(case, output_weights(127), backend=backend)


@pytest.mark.parametrize("shift", [200.0, -200.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shift_through_the_bias(dtype: torch.dtype, shift: float) -> None:
    case = make_case(127, 64, 1000, dtype=dtype)
    shifted = Case(case.hidden, case.weight, case.targets, torch.full((1000,), shift).to(dtype), {})
    check(shifted, output_weights(127), backend="chunked")


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("alone", range(4), ids=NAMES)
def test_each_outputs_gradient_alone(alone: int, backend: str) -> None:
    case = make_case(50, 64, 300, option="all")
    weights = [w if k == alone else None for k, w in enumerate(output_weights(50))]
    check(case, weights, backend=backend)


def test_gradient_error_does_not_grow_with_the_number_of_chunks() -> None:
    # Contributions of one sign: a bfloat16 accumulator would stop moving after a few chunks.
    case = make_case(1388, 64, 1000, dtype=torch.bfloat16)
    positive = replace(case, hidden=case.hidden.abs())
    upstream = [torch.full((1388,), -0.1), None, None, None]
    check(positive, upstream, backend="chunked", chunk_tokens=4)


def test_results_do_not_depend_on_the_chunk_size() -> None:
    case = make_case(127, 64, 1000, option="all")
    results = []
    for chunk_tokens in (1, 10, 127, None):
        leaves = case.fresh()
        outputs = run(leaves, chunk_tokens=chunk_tokens)
        grads = weighted_gradients(leaves, outputs, output_weights(127))
        results.append([*outputs, *grads])
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_two_runs_are_bitwise_equal() -> None:
    for dtype in DTYPES:
        case = make_case(127, 64, 1000, option="all", dtype=dtype)
        runs = []
        for _ in range(2):
            leaves = case.fresh()
            outputs = run(leaves)
            runs.append([*outputs, *weighted_gradients(leaves, outputs, output_weights(127))])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_backward_twice_over_a_retained_graph_gives_the_same_gradients() -> None:
    leaves = make_case(30, 16, 100, option="all").fresh()
    total = torch.stack([x.sum() for x in run(leaves)]).sum()
    first = torch.autograd.grad(total, leaves.tensors(), retain_graph=True)
    second = torch.autograd.grad(total, leaves.tensors())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("option", ["plain", "all"])
def test_gradcheck_in_float64(backend: str, option: str) -> None:
    case = make_case(6, 5, 11, option=option).fresh(torch.float64)

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        bias = tensors[2] if len(tensors) == 3 else None
        output = linear_logprob(
            tensors[0],
            tensors[1],
            case.targets,
            bias=bias,
            **case.options,
            backend=backend,
            chunk_tokens=4,
        )
        return tuple(x for x in output[:4] if x is not None)

    assert torch.autograd.gradcheck(outputs, case.tensors())


@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
def test_gradient_of_one_input_alone(needed: str) -> None:
    case = make_case(40, 16, 100, option="all")
    everything = case.fresh()
    expected = weighted_gradients(everything, run(everything), output_weights(40))
    alone = case.fresh()
    names = ("hidden", "weight", "bias")
    for name, tensor in zip(names, alone.tensors(), strict=True):
        tensor.requires_grad_(name == needed)
    outputs = run(alone)
    terms = zip(outputs, output_weights(40), strict=True)
    torch.stack([(w * x).sum() for x, w in terms]).sum().backward()
    for name, tensor, grad in zip(names, alone.tensors(), expected, strict=True):
        if name == needed:
            assert tensor.grad is not None and torch.equal(tensor.grad, grad)
        else:
            assert tensor.grad is None


def test_weight_in_float32_under_bfloat16_hidden() -> None:
    # The trainer's case: fp32 master weights, the head's GEMMs in bfloat16.
    case = make_case(127, 64, 1000, dtype=torch.bfloat16, option="all")
    rounded = case.fresh()
    mixed = Case(
        rounded.hidden.detach().requires_grad_(),
        rounded.weight.detach().float().requires_grad_(),
        case.targets,
        case.bias.float().requires_grad_() if case.bias is not None else None,
        case.options,
    )
    outputs, same = run(mixed), run(rounded)
    assert all(torch.equal(a, b) for a, b in zip(outputs, same, strict=True))
    grads = weighted_gradients(mixed, outputs, output_weights(127))
    expected = weighted_gradients(rounded, same, output_weights(127))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    for ours, theirs in zip(grads, expected, strict=True):
        assert torch.equal(ours.to(theirs.dtype), theirs)
