"""A frozen head: two GEMMs, and the gradient of hidden against float64 autograd."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from aepo_kernels import linear_logprob, linear_token_loss
from tests.kernels.gemm_units import counted
from tests.kernels.gpu_gemms import float16_as_on_a_gpu
from tests.kernels.head.test_lora import SCALE, factors, merged
from tests.kernels.oracle import (
    OPTIONS,
    Case,
    assert_as_accurate,
    make_case,
    materialised,
    output_weights,
)

NAMES = ("logprob", "entropy", "lse", "second_logprob")
DTYPES = [torch.float32, torch.bfloat16]


def frozen(case: Case, dtype: torch.dtype | None = None) -> Case:
    """A copy of which hidden alone needs a gradient."""
    leaves = case.fresh(dtype)
    for tensor in leaves.tensors()[1:]:
        tensor.requires_grad_(False)
    return leaves


def active(case: Case) -> int:
    """The number of tokens that are not ignored."""
    return int((case.targets != -100).sum())


def by_hidden(case: Case, outputs: Any, name: str = "logprob") -> Tensor:
    """The gradient of a weighted sum of one output."""
    index = NAMES.index(name)
    weights = output_weights(len(case.hidden))[index]
    return torch.autograd.grad((outputs[index] * weights).sum(), case.hidden)[0]


def check(case: Case, name: str = "logprob", **options: Any) -> None:
    """Compare the gradient of one output with float64's, and the outputs with materialised ones."""
    truth, base, leaves = frozen(case, torch.float64), frozen(case), frozen(case)
    outputs = linear_logprob(
        *(leaves.hidden, leaves.weight, leaves.targets), **leaves.keywords(), **options
    )
    exact, rounded = materialised(truth), materialised(base)
    for ours, theirs, right in zip(outputs[:4], rounded, exact, strict=True):
        if ours is not None and theirs is not None and right is not None:
            assert_as_accurate(ours, theirs, right, "output")
    found = by_hidden(leaves, outputs, name)
    assert found.dtype == case.hidden.dtype
    assert (found[case.targets == -100] == 0).all()
    expected = by_hidden(base, rounded, name), by_hidden(truth, exact, name)
    assert_as_accurate(found, *expected, f"gradient by {name}")


@pytest.mark.parametrize(
    ("option", "options", "taken", "units"),
    [
        ("plain", {}, ("logprob",), 2),
        ("plain", {"grad_of": ["logprob"]}, ("logprob",), 2),
        ("plain", {"grad_of": ["entropy"]}, ("entropy",), 2),
        ("plain", {"grad_of": ["logprob", "entropy"]}, ("logprob", "entropy"), 3),
        ("plain", {}, ("logprob", "entropy"), 4),
        ("second", {}, ("logprob",), 3),
        ("second", {"grad_of": ["second_logprob"]}, ("second_logprob",), 2),
        ("plain", {"weight_slice": 100}, ("logprob",), 3),
        ("plain", {"sum_squares": True, "mean_logits": True, "is_top1": True}, ("logprob",), 2),
    ],
)
def test_number_of_gemms(option: str, options: dict, taken: tuple[str, ...], units: int) -> None:
    case = frozen(make_case(60, 32, 300, option=option))
    with counted(60, 32, 300) as count, warnings.catch_warnings():
        warnings.simplefilter("error" if units < 4 else "ignore")
        output = linear_logprob(
            *(case.hidden, case.weight, case.targets), **case.options, **options, chunk_tokens=25
        )
        total = torch.stack([getattr(output, name).sum() for name in taken]).sum()
        total.backward()
    assert count.total == pytest.approx(units)


def test_number_of_gemms_of_others() -> None:
    case = frozen(make_case(60, 32, 300))
    given = case.hidden, case.weight, case.targets
    with counted(60, 32, 300) as count:
        loss = linear_token_loss(*given, lambda logprob, entropy, _: (logprob - entropy).sum())
        loss.loss.backward()
    assert count.total == pytest.approx(2)
    with counted(60, 32, 300) as count, torch.no_grad():
        assert not linear_logprob(*given).logprob.requires_grad
    assert count.total == pytest.approx(1)
    with counted(60, 32, 300) as count:  # hidden needs no gradient
        leaves = make_case(60, 32, 300)
        linear_logprob(leaves.hidden, leaves.weight.requires_grad_(), leaves.targets)
    assert count.total == pytest.approx(1)
    with FlopCounterMode(display=False) as flops:
        linear_logprob(*given, backend="reference").logprob.sum().backward()
    assert flops.get_total_flops() == 2 * 2 * 60 * 32 * 300


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_matches_float64(option: str, dtype: torch.dtype, layout: str) -> None:
    case = make_case(70, 32, 500, dtype=dtype, option=option)
    check(case, chunk_tokens=30, grad_of=("logprob",))
    if "second_temperature" not in case.options:
        check(case, chunk_tokens=30)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_direction_of_each_output(name: str, dtype: torch.dtype) -> None:
    case = make_case(70, 32, 500, dtype=dtype, option="all")
    with counted(active(case), 32, 500) as count:
        check(case, name, chunk_tokens=30, grad_of=(name,))
    assert count.total == pytest.approx(2)


@pytest.mark.parametrize("shape", [(0, 64, 1000), (1, 576, 5000), (1388, 64, 1000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(make_case(*shape, dtype=dtype))


@pytest.mark.parametrize("gpu", [False, True])
def test_float16(gpu: bool) -> None:
    case = make_case(70, 32, 500, dtype=torch.float16, option="all")
    if not gpu:
        check(case, chunk_tokens=30, grad_of=("logprob",))
        return
    with float16_as_on_a_gpu():
        check(case, chunk_tokens=30, grad_of=("logprob",))


def test_the_factor_of_float16_lifts_what_a_direction_could_not_hold() -> None:
    case = frozen(make_case(4, 8, 30, dtype=torch.float16))
    weight = case.weight * 1e-6  # a direction of some 1e-7
    output = linear_logprob(case.hidden, weight, case.targets)
    found = torch.autograd.grad((output.logprob * 2.0**14).sum(), case.hidden)[0]
    exact = frozen(case, torch.float64)
    values = materialised(replace(exact, weight=weight.double()))[0]
    assert values is not None
    truth = torch.autograd.grad((values * 2.0**14).sum(), exact.hidden)[0]
    assert (found.double() - truth).norm() < 0.002 * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frozen_adapter_is_a_part_of_the_direction(dtype: torch.dtype) -> None:
    case = make_case(70, 32, 500, dtype=dtype, option="all")

    def gradient(kind: torch.dtype) -> Tensor:
        leaves = frozen(case, kind)
        low = [x.detach() for x in factors(case, 4, kind)]
        return by_hidden(leaves, materialised(merged(leaves, *low)))

    leaves = frozen(case)
    low = dict(zip(("lora_a", "lora_b"), factors(case, 4, dtype), strict=True))
    given = leaves.hidden, leaves.weight, leaves.targets
    options = {**leaves.keywords(), "lora_scale": SCALE, "grad_of": ("logprob",)}
    idle = {name: x.detach() for name, x in low.items()}
    with counted(active(case), 32, 500) as count:
        found = by_hidden(leaves, linear_logprob(*given, **options, **idle))
    assert count.whole == 2
    assert_as_accurate(found, gradient(dtype), gradient(torch.float64), "gradient")
    with counted(active(case), 32, 500) as count:
        trained = by_hidden(leaves, linear_logprob(*given, **options, **low))
    assert count.whole == 3  # the adapter's gradient needs the logits' gradient
    assert_as_accurate(trained, gradient(dtype), gradient(torch.float64), "gradient")


def test_another_output_s_gradient_is_what_three_gemms_give_and_says_so() -> None:
    case, found = make_case(60, 32, 300, option="bias"), []
    for names in (None, ("logprob", "entropy", "lse")):
        leaves = frozen(case)
        given = leaves.hidden, leaves.weight, leaves.targets
        output = linear_logprob(*given, bias=leaves.bias, grad_of=names, chunk_tokens=25)
        total = output.logprob.sum() - 0.3 * output.entropy.sum() + output.lse.sum()
        if names is None:
            with pytest.warns(UserWarning, match=r"grad_of=\('logprob', 'entropy', 'lse',\)"):
                total.backward()
        else:
            total.backward()
        found.append(leaves.hidden.grad)
    assert torch.equal(*found)


def test_an_entropy_times_zero_spoils_nothing_on_a_cpu() -> None:
    case = frozen(make_case(60, 32, 300))
    with counted(60, 32, 300) as count, warnings.catch_warnings():
        warnings.simplefilter("error")
        output = linear_logprob(case.hidden, case.weight, case.targets)
        (output.logprob.sum() - 0.0 * output.entropy.sum()).backward()
    assert count.total == pytest.approx(2)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_outputs_that_are_not_named_are_detached(backend: str) -> None:
    case = make_case(20, 8, 30, option="second").fresh()
    given = case.hidden, case.weight, case.targets
    output = linear_logprob(
        *given, **case.options, backend=backend, grad_of=["entropy", "second_logprob"]
    )
    assert [getattr(output, name).requires_grad for name in NAMES] == [False, True, False, True]


def test_backward_twice_and_never_of_itself() -> None:
    case = frozen(make_case(30, 16, 100, option="ignored"))
    output = linear_logprob(case.hidden, case.weight, case.targets)
    first = torch.autograd.grad(output.logprob.sum(), case.hidden, retain_graph=True)[0]
    second = torch.autograd.grad(output.logprob.sum(), case.hidden, retain_graph=True)[0]
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(output.logprob.sum(), case.hidden, create_graph=True)


def test_rows_without_a_gradient_stay_zero_whatever_they_hold() -> None:
    case = frozen(make_case(6, 8, 30))
    with torch.no_grad():
        case.hidden[2] = torch.nan
    targets = case.targets.clone()
    targets[4] = -100
    upstream = torch.ones(6)
    upstream[2], upstream[4] = 0.0, torch.nan
    linear_logprob(case.hidden, case.weight, targets).logprob.backward(upstream)
    assert case.hidden.grad is not None and case.hidden.grad.isfinite().all()
    assert (case.hidden.grad[[2, 4]] == 0).all() and (case.hidden.grad[[0, 1, 3, 5]] != 0).any()


def test_logits_of_minus_infinity() -> None:
    case = make_case(20, 8, 30, option="bias")
    assert case.bias is not None
    case.bias[torch.arange(30)[~torch.isin(torch.arange(30), case.targets)]] = -torch.inf
    truth, leaves = frozen(case, torch.float64), frozen(case)
    found = linear_logprob(leaves.hidden, leaves.weight, leaves.targets, bias=leaves.bias)
    expected = by_hidden(truth, materialised(truth))
    torch.testing.assert_close(by_hidden(leaves, found).double(), expected, rtol=1e-4, atol=1e-5)


def test_autocast() -> None:
    case = make_case(40, 16, 100)
    found = []
    for cast in (False, True):
        leaves = frozen(case)
        hidden = leaves.hidden.bfloat16() if cast else leaves.hidden
        with torch.autocast("cpu", torch.bfloat16, enabled=not cast):
            output = linear_logprob(hidden, leaves.weight, leaves.targets)
        found.append(by_hidden(leaves, output))
    assert torch.equal(*found) and found[0].dtype == torch.float32


def test_a_named_output_lets_hidden_go() -> None:
    case = frozen(make_case(20, 8, 30))
    alive = []
    for names in (None, ("logprob",)):
        inputs = case.hidden * 1.0
        seen = weakref.ref(inputs)
        output = linear_logprob(inputs, case.weight, case.targets, grad_of=names)
        del inputs
        alive.append(seen() is not None)
        del output
    assert alive == [True, False]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ((), r"grad_of = \(\): names no output"),
        (("logprob", "entropies"), "'entropies' is no output with a gradient"),
        (("logprob", "logprob"), "stands there twice"),
        (("second_logprob",), "there is no second_logprob; pass second_temperature"),
    ],
)
def test_bad_names_raise(names: tuple[str, ...], reason: str) -> None:
    case = make_case(5, 8, 30)
    with pytest.raises(ValueError, match=reason):
        linear_logprob(case.hidden, case.weight, case.targets, grad_of=names)


@pytest.mark.parametrize("option", ["plain", "ignored", "all"])
def test_compiled_whole(option: str) -> None:
    case = make_case(40, 16, 100, option=option)
    options = {**case.options, "grad_of": ["logprob"], "chunk_tokens": 15}

    def gradient(compiled: bool) -> tuple[Tensor, Tensor]:
        leaves = frozen(case)

        def head(hidden: Tensor) -> Tensor:
            given = hidden * 1.0, leaves.weight, leaves.targets
            return linear_logprob(*given, bias=leaves.bias, **options).logprob

        torch._dynamo.reset()
        run = torch.compile(head, fullgraph=True, backend="aot_eager") if compiled else head
        values = run(leaves.hidden)
        return values, torch.autograd.grad(values.square().sum(), leaves.hidden)[0]

    with counted(active(case), 16, 100) as count:
        found = gradient(True)
    assert count.total == pytest.approx(2)
    assert all(torch.equal(*pair) for pair in zip(found, gradient(False), strict=True))
