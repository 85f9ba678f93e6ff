"""The C++ layer operations and their gradients against float64, on each instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aepo_kernels.cpu import layers as cpu_layers
from aepo_kernels.cpu import library as cpu_library

pytestmark = [
    pytest.mark.skipif(cpu_library.library() is None, reason="without the C++ part"),
    pytest.mark.usefixtures("isa", "threads"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding to the dtype, on top of a few in float32.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def random(*shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (size * torch.randn(*shape, generator=generator)).to(dtype)


def close(found: Tensor, truth: Tensor, *, rounding: float, size: float = 0.0) -> None:
    """Each element within `rounding` of itself, or of `size` where its terms are larger."""
    assert found.shape == truth.shape
    bound = rounding * truth.abs().clamp(min=size) * 1.01 + 1e-7
    bad = (found.double() - truth).abs() > bound
    assert not bad.any(), (found[bad][:5], truth[bad][:5])


def with_grads(
    function: Callable[..., Tensor], *inputs: Tensor, grad: Tensor
) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), list(torch.autograd.grad(out, leaves, grad.to(out.dtype)))


def plain_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64), (70, 576), (33, 1009), (0, 8)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random(*shape, dtype=dtype, size=3.0), random(shape[-1]) + 1.0
    grad = random(*shape, size=2.0).to(dtype)
    found, grads = with_grads(lambda x, w: cpu_layers.rms_norm(x, w, 1e-5), x, weight, grad=grad)
    truth, exact = with_grads(plain_norm, x.double(), weight.double(), grad=grad.double())
    assert found.dtype == grads[0].dtype == dtype and grads[1].dtype == torch.float32
    if not x.numel():
        assert not grads[1].any()
        return
    close(found, truth, rounding=ROUNDING[dtype])
    # A gradient is a difference of terms, and a sum over rows.
    terms = float(
        (grad.double() * weight).abs().max() * (x.double().pow(2).mean(-1) + 1e-5).rsqrt().max()
    )
    close(grads[0], exact[0], rounding=ROUNDING[dtype], size=0.05 * terms)
    close(
        grads[1],
        exact[1],
        rounding=2e-6,
        size=float(grad.abs().sum(tuple(range(x.ndim - 1))).max()),
    )


def test_rms_norm_to_another_dtype_rounds_once() -> None:
    x, weight = random(9, 100), random(100) + 1.0
    found = cpu_layers.rms_norm(x, weight, 1e-6, torch.bfloat16)
    assert torch.equal(found, cpu_layers.rms_norm(x, weight, 1e-6).to(torch.bfloat16))
    half = cpu_layers.rms_norm(x, weight.bfloat16(), 1e-6)
    assert torch.equal(half, cpu_layers.rms_norm(x, weight.bfloat16().float(), 1e-6))


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 1536), (40_001,), (0, 4)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = random(*shape, dtype=dtype, size=4.0), random(1, *shape, dtype=dtype)[0]
    grad = random(2, *shape)[1].to(dtype)
    found, grads = with_grads(cpu_layers.swiglu, gate, up, grad=grad)
    truth, exact = with_grads(plain_swiglu, gate.double(), up.double(), grad=grad.double())
    close(found, truth, rounding=ROUNDING[dtype])
    close(grads[0], exact[0], rounding=ROUNDING[dtype], size=1e-3)
    close(grads[1], exact[1], rounding=ROUNDING[dtype])


def test_swiglu_of_extreme_gates() -> None:
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 100.0, 1e30, float("inf"), float("nan")])
    found = cpu_layers.swiglu(gate, torch.full_like(gate, 2.0))
    truth = 2 * torch.nn.functional.silu(gate.double())
    assert torch.equal(found.isnan(), truth.isnan())
    assert torch.allclose(
        found.double(), truth, rtol=1e-6, atol=1e-35, equal_nan=True
    )  # exp is 0 below -87.7


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2), (2, 3, 5, 64), (3, 9, 4, 80), (2, 2, 3, 6), (0, 2, 3, 8)]
)
@pytest.mark.parametrize("lines", [1, None])
def test_rotary(shape: tuple[int, int, int, int], dtype: torch.dtype, lines: int | None) -> None:
    batch, heads, length, width = shape
    x = random(batch, length, heads, width, dtype=dtype).transpose(1, 2)
    # The halves' angles differ, as no model has them: the gradient must hold all the same.
    cos = random(batch if lines is None else 1, length, width)
    sin = random(7, *cos.shape)[6]
    grad = random(*shape, size=2.0).to(dtype)
    found, (x_grad,) = with_grads(lambda x: cpu_layers.rotary(x, cos, sin), x, grad=grad)
    truth, (exact,) = with_grads(
        lambda x: plain_rotary(x, cos.double(), sin.double()), x.double(), grad=grad.double()
    )
    assert found.is_contiguous()
    close(found, truth, rounding=ROUNDING[dtype], size=0.1)
    close(x_grad, exact, rounding=ROUNDING[dtype], size=0.1)


def plain_decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    copies = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
    scores = scale * torch.einsum("bhd,bhsd->bhs", q, k)
    if mask is not None:
        scores = scores + mask.double()[:, None]
    return torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (3, 9, 3, 37, 64), (2, 4, 4, 16, 80), (5, 6, 1, 130, 7)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_decode_attention(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, masked: bool
) -> None:
    batch, heads, shared, keys, width = shape
    query = random(batch, heads, width, dtype=dtype, size=2.0)
    # A cache with room for more keys than there are.
    key, value = (
        random(batch, shared, keys + 5, width + n, dtype=dtype)[:, :, :keys, n:] for n in (0, 1)
    )
    mask = None
    if masked:
        mask = torch.zeros(batch, keys, dtype=dtype)
        mask[:, : keys // 3] = torch.finfo(dtype).min
    found = cpu_layers.decode_attention(query, key, value, mask, width**-0.5)
    truth = plain_decode(query, key, value, mask, width**-0.5)
    close(found, truth, rounding=ROUNDING[dtype] + 2e-6, size=0.2)


def test_decode_attention_sees_nothing_behind_a_mask_of_minus_infinity() -> None:
    query, key, value = random(2, 2, 8), random(2, 1, 20, 8), random(2, 1, 20, 8)
    mask = torch.zeros(2, 20)
    mask[0, 3:] = -torch.inf
    mask[1] = -torch.inf
    found = cpu_layers.decode_attention(query, key, value, mask, 1.0)
    first = cpu_layers.decode_attention(query[:1], key[:1, :, :3], value[:1, :, :3], None, 1.0)
    assert torch.allclose(found[0], first[0], rtol=1e-6)
    assert not found[1].any()


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    x, weight, grad = random(301, 577), random(577), random(301, 577)
    q, k = random(7, 6, 33), random(7, 2, 70, 33)
    found: list[list[Tensor]] = []
    for count in (1, 2, 8):
        torch.set_num_threads(count)
        norm, norm_grads = with_grads(
            lambda x, w: cpu_layers.rms_norm(x, w, 1e-5), x, weight, grad=grad
        )
        gate, gate_grads = with_grads(cpu_layers.swiglu, x, grad, grad=grad)
        found.append(
            [norm, *norm_grads, gate, *gate_grads, cpu_layers.decode_attention(q, k, k, None, 1.0)]
        )
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_what_does_not_fit_raises() -> None:
    x = random(2, 3, 4, 6)
    with pytest.raises(ValueError, match=r"weight \[5\]"):
        cpu_layers.rms_norm(x, random(5), 1e-5)
    with pytest.raises(ValueError, match="must be alike"):
        cpu_layers.swiglu(x, x.half())
    with pytest.raises(TypeError, match="float64"):
        cpu_layers.rms_norm(x.double(), random(6), 1e-5)
    with pytest.raises(TypeError, match="on meta"):
        cpu_layers.swiglu(x.to("meta"), x)
    with pytest.raises(ValueError, match="cos"):
        cpu_layers.rotary(x, random(2, 4, 4), random(2, 4, 4))
    with pytest.raises(ValueError, match="query"):
        cpu_layers.decode_attention(x[:, :, 0], x, x[:, :2], None, 1.0)


def test_gradients_that_are_not_contiguous() -> None:
    gate, up = random(300, 64), random(64, 300).T
    outputs = []
    for grad in (torch.ones(1).expand(300, 64), torch.ones(300, 64)):
        outputs.append(with_grads(cpu_layers.swiglu, gate, up, grad=grad)[1])
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


def test_a_second_derivative_is_refused() -> None:
    x = random(3, 8).requires_grad_()
    for function in (
        lambda x: cpu_layers.rms_norm(x, torch.ones(8), 1e-5),
        lambda x: cpu_layers.swiglu(x, x),
        lambda x: cpu_layers.rotary(x[None, None], *[torch.ones(1, 3, 8)] * 2),
    ):
        loss = function(x).sum()  # its gradient's own gradient would be silently nothing
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(loss, x, create_graph=True)
