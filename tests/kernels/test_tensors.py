"""What the kernels cannot read raises before any work, by name; what they can read works.

No tensor may end the process, and none may give a number that is not its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from aepo_kernels import linear_logprob, linear_token_loss
from aepo_kernels.cpu import layers, unavailable_reason

COUNT, SIZE, VOCAB = 12, 8, 30
needs_cpp = pytest.mark.skipif(unavailable_reason() is not None, reason="needs the C++ part")


class Wrapper(Tensor):
    """A tensor that holds another one, as DTensor and torchao's do."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def inner(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapper) else x

        args, kwargs = torch.utils._pytree.tree_map(inner, (args, kwargs or {}))
        return func(*args, **kwargs)


class Flattened(Wrapper):
    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> Flattened:
        return Flattened(inner["inner"])  # pyright: ignore[reportReturnType]


class Named(Tensor):
    """A subclass that changes nothing."""


def given() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(COUNT, SIZE, generator=rng).requires_grad_(),
        "weight": torch.randn(VOCAB, SIZE, generator=rng).requires_grad_(),
        "targets": torch.randint(VOCAB, (COUNT,), generator=rng),
    }


OTHERS = {
    "temperature": torch.ones(COUNT),
    "second_temperature": torch.ones(COUNT),
    "bias": torch.zeros(VOCAB),
    "lora_a": torch.zeros(2, SIZE),
    "lora_b": torch.zeros(VOCAB, 2),
    "weight_grad": torch.zeros(VOCAB, SIZE),
    "active": torch.arange(COUNT),
}


def policy_gradient(logprob: Tensor, entropy: Tensor, second: Any, advantage: Tensor) -> Tensor:
    return -(logprob * advantage).sum() - 0.1 * entropy.sum()


def token_loss(advantage: Tensor, **arguments: Any) -> Any:
    hidden, weight, targets = (arguments.pop(x) for x in ("hidden", "weight", "targets"))
    return linear_token_loss(hidden, weight, targets, policy_gradient, advantage, **arguments)


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "wraps other tensors": Flattened,
    "has no memory of its own": Wrapper,
    "is no tensor": Tensor.tolist,
    "is not laid out": Tensor.to_sparse,
}


@pytest.mark.parametrize("reason", KINDS)
@pytest.mark.parametrize("name", ["hidden", "weight", "targets", *OTHERS, "token_tensors[0]"])
def test_what_cannot_be_read_is_refused_by_its_name(name: str, reason: str) -> None:
    arguments: dict[str, Any] = given()
    if name.startswith("lora"):
        arguments |= {x: OTHERS[x] for x in ("lora_a", "lora_b")}
    advantage = torch.ones(COUNT)
    if name.startswith("token"):
        advantage = KINDS[reason](advantage)
    else:
        arguments[name] = KINDS[reason](OTHERS.get(name, arguments.get(name)).detach())
    if reason == "is no tensor" and "temperature" in name:
        return  # a temperature may be a number
    match = f"^{name.replace('[', '.').replace(']', '.')} = .*: {reason}"
    with pytest.raises(ValueError, match=match):
        token_loss(advantage, **arguments)
    if name not in ("active", "token_tensors[0]"):
        with pytest.raises(ValueError, match=match):
            linear_logprob(**arguments)


@pytest.mark.parametrize("name", ["hidden", "weight", "targets"])
def test_a_lack_is_refused_too(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} = None: is no tensor"):
        linear_logprob(**given() | {name: None})


def test_the_refusal_of_a_wrapper_says_what_to_pass() -> None:
    with pytest.raises(
        ValueError, match=r"full_tensor\(\), or to_local\(\) with shard=Vocab.*, .*forward"
    ):
        linear_logprob(**given() | {"weight": Flattened(torch.zeros(VOCAB, SIZE))})


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (torch._neg_view, r"pass resolve_neg\(\)"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "is quantised"),
        (Tensor.to_sparse_csr, "is not laid out"),
        (Tensor.to_mkldnn, "is not laid out"),
        (lambda x: torch.nested.nested_tensor([x]), "is not laid out"),
        (lambda x: nn.UninitializedParameter(), "has no memory yet"),
        (lambda x: x + 0j, "unsupported dtype"),
        (Tensor.char, "unsupported dtype"),
        (torch._to_functional_tensor, "is being traced"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_of_other_kinds_are_refused(kind: Callable[[Tensor], Tensor], reason: str) -> None:
    value = kind(torch.ones(COUNT, SIZE))
    with pytest.raises(ValueError, match=f"^hidden = .*{reason}"):
        linear_logprob(**given() | {"hidden": value})
    with pytest.raises(ValueError, match=f"^hidden = .*{reason}"):
        token_loss(torch.ones(COUNT), **given() | {"hidden": value})


@pytest.mark.parametrize(
    "kind", [nn.Parameter, nn.Buffer, lambda x: x.as_subclass(Named)], ids=["p", "b", "subclass"]
)
def test_subclasses_with_memory_of_their_own_work(kind: Callable[[Tensor], Tensor]) -> None:
    plain, named = given(), given()
    named |= {"weight": kind(named["weight"].detach()), "hidden": named["hidden"]}
    losses = [token_loss(torch.ones(COUNT), **x).loss for x in (plain, named)]
    assert torch.equal(losses[0], losses[1].as_subclass(Tensor))
    for loss in losses:
        loss.backward()
    assert torch.equal(plain["hidden"].grad, named["hidden"].grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
def test_transforms_of_torch_func_are_refused(transform: Any) -> None:
    inputs = {name: tensor.detach() for name, tensor in given().items()}
    hidden = inputs.pop("hidden")
    batch = torch.stack([hidden] * 2) if transform is torch.func.vmap else hidden
    for call in (
        lambda x: linear_logprob(x, **inputs).logprob.sum(),
        lambda x: token_loss(torch.ones(COUNT), hidden=x, **inputs).loss,
    ):
        with pytest.raises(ValueError, match="hidden = .*: is inside a transform of torch.func"):
            transform(call)(batch)


def test_forward_mode_is_refused() -> None:
    inputs = {name: tensor.detach() for name, tensor in given().items()}
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs["hidden"], torch.ones(COUNT, SIZE))
        with pytest.raises(ValueError, match="hidden = .* has a tangent"):
            linear_logprob(**inputs | {"hidden": dual})
        dual = forward_ad.make_dual(torch.ones(COUNT), torch.ones(COUNT))
        with pytest.raises(ValueError, match=r"token_tensors\[0\] = .* has a tangent"):
            token_loss(dual, **inputs)


@pytest.mark.parametrize("older_vmap", [False, True])
def test_batched_gradients_are_refused(older_vmap: bool) -> None:
    inputs = given()
    with pytest.raises(RuntimeError, match="linear_logprob: .* is a batch of vmap"):
        if older_vmap:
            torch.autograd.functional.jacobian(
                lambda x: linear_logprob(**inputs | {"hidden": x}).logprob,
                inputs["hidden"],
                vectorize=True,
            )
        else:
            output, rows = linear_logprob(**inputs).logprob, torch.eye(COUNT)
            torch.autograd.grad(output, inputs["hidden"], rows, is_grads_batched=True)


def test_a_gradient_that_is_negated_as_it_is_read_counts_as_it_reads() -> None:
    inputs = given()
    output, up = linear_logprob(**inputs).logprob, torch.randn(COUNT)
    negated = torch._neg_view(-up)
    one, other = (
        torch.autograd.grad(output, inputs["hidden"], grad, retain_graph=True)[0]
        for grad in (up, negated)
    )
    assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore")
def test_tracing_with_fixed_numbers_is_refused() -> None:
    inputs = [tensor.detach() for tensor in given().values()]
    with pytest.raises(ValueError, match=r"torch\.jit\.trace: .*use torch.export"):
        torch.jit.trace(lambda *x: linear_logprob(*x).logprob, inputs, check_trace=False)


@pytest.mark.parametrize("made_inside", [True, False])
def test_fake_tensors_have_the_shapes_of_the_results(made_inside: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs: dict[str, Any] = given()
        inputs = {name: mode.from_tensor(x.detach()) for name, x in inputs.items()}
        inputs["hidden"].requires_grad_()
        if made_inside:
            output = linear_logprob(**inputs)
            with pytest.raises(ValueError, match="linear_token_loss: .*cannot be traced"):
                token_loss(torch.ones(COUNT), **inputs)
    if not made_inside:
        output = linear_logprob(**inputs)
    assert output.logprob.shape == (COUNT,)
    output.logprob.sum().backward()
    assert inputs["hidden"].grad.shape == (COUNT, SIZE)


def test_make_fx_records_the_operator() -> None:
    hidden, weight, targets = (tensor.detach() for tensor in given().values())
    graph = make_fx(lambda *x: linear_logprob(*x).logprob)(hidden, weight, targets)
    others = hidden.flip(0), weight.flip(0), targets.flip(0)
    assert torch.equal(graph(*others), linear_logprob(*others).logprob)
    with pytest.raises(ValueError, match="linear_token_loss: .*cannot be traced"):
        make_fx(lambda x: token_loss(torch.ones(COUNT), **given() | {"hidden": x}).loss)(hidden)


def test_modes_that_only_watch_change_nothing() -> None:
    expected = token_loss(torch.ones(COUNT), **given()).loss
    with FlopCounterMode(display=False):
        assert torch.equal(token_loss(torch.ones(COUNT), **given()).loss, expected)


@pytest.mark.parametrize("changed", ["hidden", "weight", "targets"])
def test_what_changes_before_backward_is_an_error(changed: str) -> None:
    inputs = given()
    output = linear_logprob(**inputs).logprob.sum()
    with torch.no_grad():
        inputs[changed].fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@needs_cpp
@pytest.mark.parametrize(
    "call",
    [
        lambda x: layers.rms_norm(x, torch.ones(8), 1e-6),
        lambda x: layers.swiglu(x, torch.ones(3, 8)),
        lambda x: layers.rotary(x[None, None], torch.ones(1, 3, 8), torch.ones(1, 3, 8)),
        lambda x: layers.decode_attention(x[None], *[torch.ones(1, 3, 2, 8)] * 2, None, 1.0),
    ],
    ids=["rms_norm", "swiglu", "rotary", "decode_attention"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["wrapper", "negated", "fake", "dual"])
def test_layers_refuse_what_has_no_memory(call: Callable[[Tensor], Tensor], kind: str) -> None:
    class Views(Flattened):
        def __getitem__(self, index: Any) -> Any:
            return Views(self.inner[index])

    x = torch.ones(3, 8)
    with torch.no_grad(), pytest.raises(TypeError, match="got a "):
        if kind == "wrapper":
            call(Views(x))
        if kind == "negated":
            call(torch._neg_view(x))
        if kind == "fake":
            call(FakeTensorMode().from_tensor(x))
        if kind == "dual":
            with forward_ad.dual_level():
                call(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_second_derivative_is_right_or_refused(backend: str) -> None:
    inputs = given()
    for value in (
        linear_logprob(**inputs, backend=backend).logprob.sum(),
        token_loss(torch.ones(COUNT), **inputs, backend=backend).loss,
    ):
        if backend == "reference":
            (grad,) = torch.autograd.grad(value, inputs["hidden"], create_graph=True)
            grad.square().sum().backward()
            continue
        with pytest.raises(RuntimeError, match='create_graph=True.*backend="reference"'):
            torch.autograd.grad(value, inputs["hidden"], create_graph=True)
    assert (inputs["weight"].grad is not None) == (backend == "reference")


@needs_cpp
def test_layers_of_fake_tensors_make_memory_alone() -> None:
    with FakeTensorMode():
        x = torch.ones(2, 3, 4, 8, requires_grad=True)
        angles = torch.ones(1, 4, 8)
        normed = layers.rms_norm(x, torch.ones(8), 1e-6, torch.bfloat16)
        turned = layers.rotary(layers.swiglu(x, x), angles, angles)
        (normed.float() + turned).sum().backward()
        assert (normed.shape, normed.dtype) == (x.shape, torch.bfloat16)
        assert x.grad is not None and x.grad.shape == x.shape
        with pytest.raises(TypeError, match="got a FakeTensor"):
            layers.decode_attention(x[:, :, 0], x, x, None, 1.0)
