"""linear_logprob as an operator: opcheck, and torch.compile with the whole graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd

from aepo_kernels import RowSampling, linear_logprob, linear_token_loss, torch_op, whole_sums
from tests.kernels.oracle import Case, make_case, output_weights, weighted_gradients


@pytest.fixture(autouse=True)
def _each_test_compiles_anew() -> None:
    torch._dynamo.reset()


def operator_arguments(case: Case, direction: str | None = None) -> tuple[Any, ...]:
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
        direction,
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("option", ["plain", "second", "all"])
def test_opcheck(option: str) -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares memory that nobody reads
    torch.library.opcheck(
        torch_op.linear_logprob, operator_arguments(make_case(20, 8, 30, option=option).fresh())
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("option", "direction"), [("plain", "logprob"), ("all", "second_logprob")])
def test_opcheck_of_a_frozen_head(option: str, direction: str) -> None:
    torch.use_deterministic_algorithms(False)
    case = make_case(20, 8, 30, option=option).fresh()
    for tensor in case.tensors()[1:]:
        tensor.requires_grad_(False)
    torch.library.opcheck(torch_op.linear_logprob, operator_arguments(case, direction))


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

    with pytest.warns(UserWarning, match=r"pass grad_of=\('entropy',\), which takes 2"):
        loss(case.hidden).backward()
    found, case.hidden.grad = case.hidden.grad, None
    with pytest.warns(UserWarning, match=r"a gradient came by entropy"):
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


def whole_loss(
    logprob: Tensor, entropy: Tensor, second: Tensor | None, advantage: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    assert not torch.is_autocast_enabled("cpu")
    ratio = torch.exp(logprob - logprob.detach() * 0.9)
    total = -(ratio.clamp(0.2, 3.0) * advantage).sum() - 0.1 * entropy.sum()
    return total + (0 if second is None else 0.1 * second.sum()), {"entropy": entropy.sum()}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("active", [False, True], ids=["", "active"])
@pytest.mark.parametrize("option", ["plain", "token_temperature", "second", "bias"])
def test_a_loss_that_traces_is_compiled_whole(option: str, active: bool, dynamic: bool) -> None:
    case, results = make_case(40, 16, 100, option=option), []
    some = torch.arange(0, 40, 3) if active else None

    def call(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
        output = linear_token_loss(
            hidden * 1.0,
            weight,
            case.targets,
            whole_loss,
            torch.linspace(-1, 1, 40),
            **case.options,
            bias=bias,
            active=some,
            ignore_index=None,
        )
        names = output.backend, output.row_kernels, output.active_rows
        return output.loss * 2.0, output.metrics["entropy"], output.logprob, output.entropy, names

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for function in (call, compiled):
        leaves = case.fresh()
        with torch.autocast("cpu", torch.bfloat16):
            *values, names = function(*leaves.tensors())
        assert names[0] == "chunked" and names[2] == (14 if active else 40)
        assert not any(value.requires_grad for value in values[1:])
        results.append([values[0].detach(), *values[1:]])
        results[-1] += torch.autograd.grad(values[0], leaves.tensors())
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_a_loss_that_traces_is_exported() -> None:
    class Module(torch.nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return loss(hidden, weight, targets, ignore_index=None)

    case = make_case(40, 16, 100)
    given = case.hidden, case.weight, case.targets
    found = torch.export.export(Module(), given).module()(*given)
    torch.testing.assert_close(found, loss(*given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "traced with ignore_index; select the tokens before"),
        ({"ignore_index": None, "weight_slice": 64}, "traced with weight_slice"),
        ({"ignore_index": None, "row_sampling": RowSampling(1.0)}, "traced with row_sampling"),
    ],
)
def test_what_no_whole_graph_can_hold_is_refused_by_name(
    options: dict[str, Any], message: str
) -> None:
    case = make_case(40, 16, 100)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=message):
        compiled(case.hidden, case.weight, case.targets, **options)


def test_a_loss_that_does_not_trace_breaks_a_graph_and_a_whole_one_says_so() -> None:
    case, seen = make_case(40, 16, 100), []

    def reads_numbers(logprob: Tensor, *_: Any) -> Tensor:
        seen.append(logprob[0].item())
        return -logprob.sum() if seen[-1] < 1 else logprob.sum()

    def call(hidden: Tensor) -> Tensor:
        given = hidden * 1.0, case.weight, case.targets, reads_numbers
        return linear_token_loss(*given, ignore_index=None, check_loss=False).loss * 2.0

    expected = call(case.hidden)
    assert torch.equal(torch.compile(call, backend="aot_eager")(case.hidden), expected)
    torch._dynamo.reset()  # or the code above would serve
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(call, fullgraph=True, backend="aot_eager")(case.hidden)
