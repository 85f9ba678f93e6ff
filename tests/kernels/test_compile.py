"""linear_logprob as an operator: opcheck, and torch.compile with the whole graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd

from aepo_kernels import RowSampling, linear_logprob, linear_token_loss, torch_op, whole_sums
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


def policy_gradient(logprob: Tensor, entropy: Tensor, second: Any, advantage: Tensor) -> Tensor:
    return -(logprob * advantage).sum() - 0.1 * entropy.sum()


def head(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    output = linear_logprob(hidden * 1.0, weight, targets, **options)
    return output.logprob.sum() + output.entropy.sum()


def loss(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    advantage = torch.linspace(-1, 1, len(targets))
    inputs = hidden * 1.0, weight, targets
    return linear_token_loss(*inputs, policy_gradient, advantage, **options).loss * 2.0


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("function", "options"),
    [
        (loss, {}),
        (loss, {"weight_slice": 64}),
        (loss, {"row_sampling": RowSampling(1e-12)}),
        (loss, {"backend": "reference"}),
        (head, {"sum_squares": True}),
        (head, {"mean_logits": True}),
        (head, {"is_top1": True}),
        (head, {"weight_slice": 64}),
        (head, {"weight_grad": "given"}),
    ],
)
def test_what_no_graph_can_hold_breaks_it(
    function: Any, options: dict[str, Any], dynamic: bool
) -> None:
    case = make_case(40, 16, 100)
    results = []
    for call in (function, torch.compile(function, backend="aot_eager", dynamic=dynamic)):
        leaves = case.fresh()
        given = dict(options)
        if "weight_grad" in given:
            given["weight_grad"] = torch.zeros(100, 16)
        value = call(leaves.hidden, leaves.weight, leaves.targets, **given)
        value.backward()
        grads = [x.grad for x in leaves.tensors()]
        results.append([value.detach(), *grads, given.get("weight_grad")])
    for one, other in zip(*results, strict=True):
        assert one is other or torch.equal(one, other)


def test_a_compiled_loss_adds_to_a_buffer_once() -> None:
    case = make_case(40, 16, 100).fresh()
    compiled = torch.compile(
        lambda buffer: (
            linear_token_loss(
                *(case.hidden, case.weight, case.targets),
                policy_gradient,
                torch.ones(40),
                weight_grad=buffer,
            ).loss
        ),
        backend="aot_eager",
    )
    buffer = torch.zeros(100, 16)
    compiled(buffer).backward()
    linear_token_loss(
        case.hidden, case.weight, case.targets, policy_gradient, torch.ones(40)
    ).loss.backward()
    assert torch.equal(buffer, case.weight.grad)  # type: ignore[arg-type]


def test_compiled_autograd_calls_the_backward_as_it_is() -> None:
    case = make_case(40, 16, 100)
    grads = []
    for compiled in (False, True):
        leaves = case.fresh()
        value = head(leaves.hidden, leaves.weight, leaves.targets)
        value = value + loss(leaves.hidden, leaves.weight, leaves.targets)
        if compiled:
            with compiled_autograd._enable(torch.compile(backend="eager")):
                value.backward()
        else:
            value.backward()
        grads.append([x.grad for x in leaves.tensors()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_whole_sums_may_stand_in_compiled_code() -> None:
    def square(x: Tensor) -> Tensor:
        with whole_sums:
            y = x @ x
        return y + 1

    x = torch.randn(4, 4)
    assert torch.equal(torch.compile(square, backend="aot_eager")(x), square(x))


def test_what_cannot_be_exported_says_so() -> None:
    class Module(torch.nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return loss(hidden, weight, targets)

    case = make_case(40, 16, 100)
    with pytest.raises(ValueError, match="linear_token_loss: .*cannot be traced"):
        torch.export.export(Module(), (case.hidden, case.weight, case.targets))
