"""linear_logprob as an operator: opcheck, and torch.compile with the whole graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aepo_kernels import linear_logprob, torch_op
from tests.kernels.oracle import Case, make_case, output_weights, weighted_gradients


def operator_arguments(case: Case) -> tuple[Any, ...]:
    def split(value: Any, default: float | None) -> tuple[Tensor | None, float | None]:
        return (value, default) if isinstance(value, Tensor) else (None, value)

    options = case.options
    return (
        case.hidden,
        case.weight,
        case.bias,
        None,
        None,
        case.targets,
        *split(options.get("temperature", 1.0), 1.0),
        *split(options.get("second_temperature"), None),
        options.get("softcap"),
        options.get("logit_scale", 1.0),
        1.0,
        -100,
        None,
        "chunked",
        7,
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("option", ["plain", "second", "all"])
def test_opcheck(option: str) -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares memory that nobody reads
    torch.library.opcheck(
        torch_op.linear_logprob, operator_arguments(make_case(20, 8, 30, option=option).fresh())
    )


@pytest.mark.parametrize("option", ["plain", "token_temperature", "second", "all"])
def test_compiled_whole_it_gives_what_it_gives_eagerly(option: str) -> None:
    case = make_case(40, 16, 100, option=option)

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        options = case.keywords() if bias is None else {**case.keywords(), "bias": bias}
        output = linear_logprob(hidden * 1.0, weight, case.targets, **options, chunk_tokens=15)
        assert output.backend == "chunked"
        return [x for x in output[:4] if x is not None]

    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    results = []
    for function in (head, compiled):
        leaves = case.fresh()
        outputs = function(leaves.hidden, leaves.weight, leaves.bias)
        padded = [*outputs, *[None] * (4 - len(outputs))]
        results.append([*outputs, *weighted_gradients(leaves, padded, output_weights(40))])
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_frozen_weight_and_an_unused_output_need_no_gradient() -> None:
    case = make_case(40, 16, 100).fresh()
    case.weight.requires_grad_(False)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(hidden: Tensor) -> Tensor:
        return linear_logprob(hidden, case.weight, case.targets).entropy.sum()

    loss(case.hidden).backward()
    found, case.hidden.grad = case.hidden.grad, None
    linear_logprob(case.hidden, case.weight, case.targets).entropy.sum().backward()
    assert found is not None and case.hidden.grad is not None and case.weight.grad is None
    assert torch.equal(found, case.hidden.grad)


def test_bad_arguments_raise_inside_a_compiled_function_too() -> None:
    case = make_case(5, 8, 30)
    compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"targets = 30: outside \[0, 30\)"):
        compiled(case.hidden, case.weight, torch.full((5,), 30))


def test_the_reference_is_no_operator() -> None:
    case = make_case(5, 8, 30)
    compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="backend = 'reference': .*outside of torch.compile"):
        compiled(case.hidden, case.weight, case.targets, backend="reference")
