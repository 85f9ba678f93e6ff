"""A token loss that is no sum over tokens, or that reads parameters, raises; no other loss does."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aepo_kernels import linear_token_loss, loss_checks
from aepo_kernels.loss_checks import worst_difference
from tests.kernels.oracle import make_case

BACKENDS = ["reference", "chunked"]
COUNT = 40


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_checks, "_known", set())


def run(loss: Any, *columns: Tensor, seed: int = 0, **options: Any) -> Any:
    case = make_case(COUNT, 8, 30, seed=seed).fresh()
    inputs = case.hidden, case.weight, case.targets
    return linear_token_loss(*inputs, loss, *columns, **options)


def advantages() -> Tensor:
    return torch.linspace(-1, 1, COUNT)  # they add up to nothing, as a group's do


LOSSES = {
    "mean": lambda lp, entropy, second, adv: (lp * adv).mean(),
    "mean of ratios": lambda lp, e, s, adv: ((lp - lp.detach()).exp() * adv).mean(),
    "mean entropy": lambda lp, entropy, second, adv: (lp * adv).sum() + 0.01 * entropy.mean(),
    "divided by length": lambda lp, e, s, adv: (lp * adv).sum() / len(lp),
    "masked mean": lambda lp, e, s, adv: (lp * adv)[adv > 0].mean(),
    "whitened": lambda lp, e, s, adv: (lp * (adv - adv.mean()) / adv.std()).sum(),
    "softmax over tokens": lambda lp, e, s, adv: (torch.softmax(lp, 0) * adv).sum(),
    "square of the sum": lambda lp, e, s, adv: lp.sum() ** 2,
    "maximum": lambda lp, e, s, adv: lp.max(),
    "second moment": lambda lp, e, s, adv: lp.var() * len(lp),
    "of neighbours": lambda lp, e, s, adv: (lp[1:] * lp[:-1]).sum(),
    "constant": lambda lp, e, s, adv: lp.sum() * 0 + 3.0,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_no_sum_over_tokens_raises(name: str, grad: bool, backend: str) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="no sum over tokens"):
        run(LOSSES[name], advantages(), backend=backend)


def test_the_message_names_a_token_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"token \d+ of 40 has the derivative .*\.sum\(\), with a"):
        run(LOSSES["mean"], advantages())


SUMS = {
    "sum": lambda lp, entropy, second, adv: (lp * adv).sum(),
    "weighted": lambda lp, e, s, adv: (lp * adv / 1e6).sum(),
    "clipped": lambda lp, e, s, adv: -torch.minimum((lp + 2).exp() * adv, adv).sum(),
    "no gradient": lambda lp, e, s, adv: adv.sum(),
    "nothing": lambda lp, e, s, adv: (lp * 0 * adv).sum(),
    "infinite": lambda lp, e, s, adv: (lp * 1e30).exp().sum() / 0 + lp.sum(),
    "not a number": lambda lp, e, s, adv: (lp * torch.where(adv > 0, adv, torch.nan)).sum(),
    "random": lambda lp, e, s, adv: (lp * torch.rand(len(lp))).sum(),
    "dropout": lambda lp, e, s, adv: nn.functional.dropout(lp, 0.5).sum(),
    "a size built in": lambda lp, e, s, adv: (lp * torch.ones(COUNT)).sum(),
    "groups": lambda lp, e, s, adv: (lp.view(-1, 4).mean(1)).sum(),
    "half precision": lambda lp, e, s, adv: (lp.bfloat16() * adv.bfloat16()).sum().float(),
    "in place": lambda lp, e, s, adv: (lp * adv.mul_(1.5)).sum(),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SUMS)
def test_sums_pass_with_the_same_numbers(name: str, backend: str) -> None:
    results = []
    for check in (True, False):
        torch.manual_seed(0)
        output = run(SUMS[name], advantages(), backend=backend, check_loss=check)
        results.append((output.loss.detach(), torch.rand(3)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_a_loss_is_compared_once_however_often_it_is_made_anew() -> None:
    calls = []

    def make(reduction: str) -> Any:
        def loss(lp: Tensor, *_: Any) -> Tensor:
            calls.append(len(lp))
            return getattr(lp, reduction)()

        return loss

    for _ in range(3):
        run(make("sum"))
    assert calls == [40, 20, 20, 40, 40, 40, 40]
    with pytest.raises(ValueError, match="no sum over tokens"):  # the same code, but for a string
        run(make("mean"))


@pytest.mark.parametrize("kind", ["partial", "method", "object", "default", "attribute"])
def test_what_a_callable_holds_belongs_to_its_identity(kind: str) -> None:
    class Loss:
        def __init__(self, reduction: str) -> None:
            self.reduction = reduction

        def __call__(self, lp: Tensor, *_: Any) -> Tensor:
            return getattr(lp, self.reduction)()

        def compute(self, lp: Tensor, *_: Any) -> Tensor:
            return self(lp)

    def named(lp: Tensor, *_: Any, reduction: str) -> Tensor:
        return getattr(lp, reduction)()

    def make(reduction: str) -> Any:
        if kind == "partial":
            return partial(named, reduction=reduction)
        if kind == "method":
            return Loss(reduction).compute
        if kind == "object":
            return Loss(reduction)
        if kind == "default":
            return lambda lp, *_, reduction=reduction: getattr(lp, reduction)()
        inner = Loss(reduction).compute
        return lambda lp, *_: inner(lp)

    run(make("sum"))
    with pytest.raises(ValueError, match="no sum over tokens"):
        run(make("mean"))


def test_a_closure_that_holds_itself_is_fine() -> None:
    def loss(lp: Tensor, *_: Any, depth: int = 1) -> Tensor:
        return loss(lp, depth=0) if depth else lp.sum()

    run(loss)


def test_a_chunk_that_says_nothing_leaves_the_loss_to_the_next_call() -> None:
    loss = LOSSES["mean"]
    run(loss, torch.zeros(COUNT))
    with pytest.raises(ValueError, match="no sum over tokens"):
        run(loss, advantages())


def test_one_token_can_not_be_halved() -> None:
    run(LOSSES["mean"], advantages(), chunk_tokens=1)


def test_a_refused_loss_adds_nothing_to_a_buffer() -> None:
    buffer = torch.zeros(30, 8)
    with pytest.raises(ValueError, match="no sum over tokens"):
        run(LOSSES["mean"], advantages(), weight_grad=buffer)
    assert not buffer.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depth", [0, 3])
def test_a_loss_that_reads_parameters_raises_with_their_shapes(depth: int, backend: str) -> None:
    weight = torch.ones(5, 7, requires_grad=True)

    def loss(lp: Tensor, *_: Any) -> Tensor:
        scale = weight
        for _ in range(depth):
            scale = scale.sin()
        return lp.sum() * scale.mean()

    with pytest.raises(ValueError, match=r"token_loss reads tensors .* \[5, 7\]: .*detach"):
        run(loss, backend=backend)
    with torch.no_grad():
        run(loss, backend=backend)
    weight.requires_grad_(False)
    run(loss, backend=backend).loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_in_the_loss_raises(backend: str) -> None:
    value_head = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"of shapes \[1, 1\], \[1\]"):
        run(lambda lp, *_: value_head(lp[:, None]).sum(), backend=backend)


def test_differences_are_those_beyond_roundings() -> None:
    whole = torch.tensor([1.0, -2.0, 0.5])
    assert worst_difference(whole, whole * (1 + 1e-6)) is None
    assert worst_difference(whole, whole + torch.tensor([0.0, 0.0, 1e-3])) == 2
    assert worst_difference(whole * 1e-9, whole * 2e-9) == 1
    assert worst_difference(whole * 1e-9, whole * 2e-9, least=1.0) is None
    bad = torch.tensor([torch.inf, torch.nan, 1.0])
    assert worst_difference(bad, bad) is None
    assert worst_difference(whole, bad) in (0, 1)
