"""Both functions under autocast: GEMMs in its dtype as nn.Linear's, statistics in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aepo_kernels import linear_logprob, linear_token_loss
from tests.kernels.oracle import Case, make_case, materialised, output_weights, weighted_gradients

FUNCTIONS = "logprob", "token_loss"
BFLOAT16 = torch.bfloat16


def results(
    case: Case,
    name: str,
    *,
    autocast: bool = False,
    cast: bool = False,
    dtype: torch.dtype = BFLOAT16,
    **more: Any,
) -> list[Tensor | None]:
    """Outputs and the gradients of the leaves. cast: the caller's own cast of hidden."""
    leaves = case.fresh()
    hidden = leaves.hidden.to(dtype) if cast else leaves.hidden
    given, options = (hidden, leaves.weight, leaves.targets), {**leaves.keywords(), **more}
    advantage = torch.linspace(-1, 1, len(hidden))
    with torch.autocast("cpu", dtype, enabled=autocast):
        if name == "logprob":
            outputs: list[Tensor | None] = [*linear_logprob(*given, **options)[:4]]
        else:
            output = linear_token_loss(*given, loss, advantage, **options)
            outputs = [output.loss, output.logprob]
    if name == "logprob":
        return [*outputs, *weighted_gradients(leaves, outputs, output_weights(len(hidden)))]
    return [*outputs, *torch.autograd.grad(output.loss, leaves.tensors())]


def loss(logprob: Tensor, entropy: Tensor, _: Tensor | None, advantage: Tensor) -> Tensor:
    assert not torch.is_autocast_enabled("cpu")
    return -(logprob * advantage).sum() - 0.1 * entropy.sum()


def equal(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(
        a is b or (a.dtype == b.dtype and torch.equal(a, b))  # type: ignore[union-attr,arg-type]
        for a, b in pairs
    )


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16], ids=str)
@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_float32_hidden_follows_it(name: str, option: str, dtype: torch.dtype) -> None:
    case = make_case(64, 32, 200, option=option)
    found = results(case, name, autocast=True, dtype=dtype)
    assert all(x is None or x.dtype == torch.float32 for x in found)
    assert equal(found, results(case, name, cast=True, dtype=dtype))
    assert not equal(found, results(case, name))


def test_its_error_is_that_of_a_linear_layer_and_float32_statistics() -> None:
    case = make_case(127, 64, 1000)
    with torch.autocast("cpu", BFLOAT16):
        found = linear_logprob(case.hidden, case.weight, case.targets).logprob
        logits = torch.nn.functional.linear(case.hidden, case.weight).float()
    truth = materialised(case.fresh(torch.float64))[0]
    theirs = torch.log_softmax(logits, 1).gather(1, case.targets[:, None])[:, 0]
    assert truth is not None
    error, allowed = ((x.double() - truth).abs().max() for x in (found, theirs))
    assert error <= 2 * allowed


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "more", [{"logits_dtype": torch.float32}, {"backend": "reference"}], ids=str
)
def test_who_asks_for_float32_gets_it(name: str, more: dict[str, Any]) -> None:
    case = make_case(64, 32, 200, option="all")
    found = results(case, name, autocast=True, **more)
    assert equal(found, results(case, name, **more))


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float64], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_dtypes_are_not_cast(name: str, dtype: torch.dtype) -> None:
    case = make_case(64, 32, 200, option="all", dtype=dtype)
    found = results(case, name, autocast=True)
    assert equal(found, results(case, name))


def test_a_backward_inside_of_it_is_the_same() -> None:
    case = make_case(64, 32, 200, option="all")
    grads = []
    for inside in (False, True):
        leaves = case.fresh()
        with torch.autocast("cpu", BFLOAT16):
            given = leaves.hidden, leaves.weight, leaves.targets
            outputs = linear_logprob(*given, **leaves.keywords())[:4]
            total = torch.stack([x.sum() for x in outputs if x is not None]).sum()
            if inside:
                total.backward()
        if not inside:
            total.backward()
        grads.append([x.grad for x in leaves.tensors()])
    assert equal(*grads)


@pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])
def test_a_compiled_head_follows_it(around: bool) -> None:
    case = make_case(40, 16, 100, option="all")

    def head(hidden: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        options = {**case.options, "bias": bias}
        if around:
            return list(linear_logprob(hidden * 1.0, weight, case.targets, **options)[:4])  # type: ignore[arg-type]
        with torch.autocast("cpu", BFLOAT16):
            return list(linear_logprob(hidden * 1.0, weight, case.targets, **options)[:4])  # type: ignore[arg-type]

    compiled, found = torch.compile(head, fullgraph=True, backend="aot_eager"), []
    for call, enabled in ((head, around), (compiled, around), (head, False), (compiled, False)):
        leaves = case.fresh()
        with torch.autocast("cpu", BFLOAT16, enabled=enabled):
            outputs = call(*leaves.tensors())
        found.append([*outputs, *weighted_gradients(leaves, outputs, output_weights(40))])
    assert equal(found[0], found[1]) and equal(found[2], found[3])
    assert equal(found[0], found[2]) != around


def test_a_compiled_loss_follows_it() -> None:
    case = make_case(40, 16, 100)

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", BFLOAT16):
            given = hidden * 1.0, weight, case.targets
            return linear_token_loss(*given, loss, torch.linspace(-1, 1, 40)).loss

    found: list[list[Tensor | None]] = []
    for function in (call, torch.compile(call, backend="aot_eager")):
        leaves = case.fresh()
        value = function(*leaves.tensors())
        found.append([value, *torch.autograd.grad(value, leaves.tensors())])
    assert equal(*found)
    assert torch.equal(found[0][0], results(case, "token_loss", cast=True)[0])  # type: ignore[arg-type]
