"""torch's default dtype is the caller's: results do not depend on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from aepo_kernels import linear_logprob, linear_token_loss
from aepo_kernels.cpu import layers as cpu_layers
from aepo_kernels.cpu import library as cpu_library
from tests.kernels.oracle import make_case


@pytest.fixture
def restored() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("layout", "restored")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_heads(default: torch.dtype, dtype: torch.dtype) -> None:
    case = make_case(300, 32, 5000, dtype=dtype, option="all")
    advantage = torch.ones(300)
    results = []
    for chosen in (torch.float32, default):
        torch.set_default_dtype(chosen)
        leaves = case.fresh()
        given = leaves.hidden, leaves.weight, leaves.targets
        output = linear_logprob(*given, **leaves.keywords())
        (output.logprob.sum() + output.entropy.sum()).backward()
        loss = linear_token_loss(
            *given,
            lambda logprob, *rest: (rest[-1] * logprob).sum(),
            advantage,
            **leaves.keywords(),
        ).loss
        loss.backward()
        results.append([*output[:4], loss, *(x.grad for x in leaves.tensors())])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.skipif(cpu_library.library() is None, reason="without the C++ part")
@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_layers(default: torch.dtype) -> None:
    x, weight = torch.randn(40, 64), torch.randn(64)
    results = []
    for chosen in (torch.float32, default):
        torch.set_default_dtype(chosen)
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        out = cpu_layers.rms_norm(*leaves, 1e-5)
        out.sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
