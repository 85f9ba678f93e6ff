"""A drawn call in float64, and how far a rounding may move its results.

What is allowed is the kernels' own rounding. The truth in float64 has the inputs that the GEMMs
get, rounded to hidden's dtype. It is computed again with all that the kernels write in that dtype
between their steps, the logits, their gradient and what passes through a LoRA's rank, off by a
whole unit u up or down at random: as far as a rounding can go. How far that moves a result, plus u
of the result for its own rounding, is allowed. Roundings are as random, and smaller: errors reach
about half of it.

For bfloat16, u = 2^-8, and for float16, u = 2^-11, since sums are in float32 whose errors are far
smaller: that allows 1% of most gradients and 5% of the worst, where logits are large. For float32,
u = 2^-24 sqrt(L), as a sum of L terms is off by a random walk of L roundings; L is the longest sum,
over tokens, the vocabulary or hidden. So it is for float64, with 2^-53.

A gradient pass may make logits again, by another GEMM whose sums round otherwise. Then
probabilities do not quite add up to one. Nor do they where a normaliser is rounded: all of a row's
probabilities are off by the same share, 2^-24 |lse|, which no sum over the vocabulary averages out.
`Rows` computes a gradient in this way, by the formula of docs/kernels.md; without noise, torch's
autograd does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.kernels.fuzz.draw import BF16, F16, F32, F64, Draw

_UNITS = {F32: 2.0**-24, F64: 2.0**-53}
# Where the truth is zero, sums that cancel leave a rounding of their terms.
_FLOORS = {F32: 1e-6, BF16: 1e-6, F64: 1e-14}
_NARROW = {BF16: 2.0**-8, F16: 2.0**-11}
_HALF_SMALLEST = 2.0**-25  # half of float16's smallest number


class Rounded(torch.autograd.Function):
    """Numbers and their gradients, each off by `unit` of itself, up or down at random."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: float, generator: torch.Generator) -> Tensor:
        ctx.unit, ctx.generator = unit, generator
        return _off(x, unit, generator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _off(grad, ctx.unit, ctx.generator), None, None


def _off(x: Tensor, unit: float, generator: torch.Generator) -> Tensor:
    signs = torch.randint(2, x.shape, generator=generator).to(x.dtype) * 2 - 1
    return x * (1 + unit * signs)


def unit_of(case: Draw, dtype: torch.dtype) -> float:
    """The largest rounding of a number of the call in `dtype`, as a share of it: see the module."""
    if dtype in _NARROW:
        return _NARROW[dtype]
    hidden, weight = case.tensors[:2]
    assert hidden is not None and weight is not None
    return _UNITS[dtype] * max(*hidden.shape, *weight.shape) ** 0.5


def gemm_dtype(case: Draw) -> torch.dtype:
    """The dtype of GEMMs: hidden's, and "reference" is never narrower than float32."""
    dtype = case.tensors[0].dtype  # type: ignore[union-attr]
    return F32 if case.backend == "reference" and dtype in _NARROW else dtype


def truth(case: Draw, noise: int | None = None) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The outputs of `rows` but its normalisers, and the leaves, in float64.

    With `noise`, a seed, what the kernels write between their steps is off by its largest rounding.
    """
    options, dtype = case.options, gemm_dtype(case)
    unit = unit_of(case, dtype)
    generator = torch.Generator().manual_seed(noise or 0)

    def written(x: Tensor) -> Tensor:
        return x if noise is None else Rounded.apply(x, unit, generator)  # type: ignore[return-value]

    # GEMMs take their operands in one dtype.
    narrow = [x if x is None or i == 2 else x.to(dtype) for i, x in enumerate(case.tensors)]
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in narrow]
    hidden, weight, bias, down, up = leaves
    assert hidden is not None and weight is not None
    logits = written(hidden @ weight.T)
    if down is not None and up is not None:
        low_rank = written(options["lora_scale"] * written(hidden @ down.T))
        logits = written(logits + low_rank @ up.T)
    logits = (logits if bias is None else logits + bias) * options.get("logit_scale", 1.0)
    keep = torch.ones_like(case.targets, dtype=torch.bool)
    if case.ignored is not None:
        keep = case.targets != case.ignored
    row = _RowOptions(
        torch.where(keep, case.targets, 0)[:, None],
        options.get("softcap"),
        _column(options.get("temperature", 1.0)),
        _column(options.get("second_temperature")),
    )
    if noise is None:
        outputs = rows(logits, row)[:-2]
    else:
        stats = F64 if dtype == F64 else F32
        outputs = Rows.apply(logits, row, unit_of(case, stats), _UNITS[stats], dtype, generator)
    return [None if x is None else x.where(keep, 0.0) for x in outputs], leaves  # type: ignore[union-attr]


class _RowOptions(NamedTuple):
    """targets: [N, 1]. Temperatures: a number or [N, 1]."""

    targets: Tensor
    softcap: float | None
    temperature: Any
    second_temperature: Any


def _column(temperature: Any) -> Any:
    return temperature.double()[:, None] if isinstance(temperature, Tensor) else temperature


def rows(
    x: Tensor, row: _RowOptions, kept: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[Tensor | None, ...]:
    """The outputs of logits x, [N, V], before their cap; then both normalisers, [N, 1].

    The outputs are log-prob, entropy, second log-prob, lse, sum of squares, mean of logits / T, and
    the target's logit less the largest other one.

    kept: rounds a number that a register of the statistics' dtype holds.
    """
    logits = kept(x if row.softcap is None else row.softcap * torch.tanh(x / row.softcap))
    first = logits / row.temperature
    lse = kept(first.logsumexp(-1, keepdim=True))
    logp, second, second_lse = first - lse, None, None
    if row.second_temperature is not None:
        tempered = logits / row.second_temperature
        second_lse = kept(tempered.logsumexp(-1, keepdim=True))
        second = (tempered - second_lse).gather(1, row.targets)[:, 0]
    finite = logp.masked_fill(logp == -torch.inf, 0.0)  # 0 times -inf is not 0
    weights = finite.exp().masked_fill(logp == -torch.inf, 0.0)
    logprob, entropy = logp.gather(1, row.targets)[:, 0], -(weights * finite).sum(-1)
    squares, mean = weights.square().sum(-1), first.mean(-1)
    others = logits.scatter(1, row.targets, -torch.inf).amax(-1)
    lead = logits.gather(1, row.targets)[:, 0] - others
    return logprob, entropy, second, lse[:, 0], squares, mean, lead, lse, second_lse


class Rows(torch.autograd.Function):
    """`rows`, with the gradient of logits that were made again and statistics that are rounded.

    walk: the rounding of a sum of many terms; unit: that of one number, both of the statistics'
    dtype. A narrower logit rounds to its neighbour now and then, when its sum is another one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row: _RowOptions,
        walk: float,
        unit: float,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> tuple[Tensor | None, ...]:
        ctx.more = row, walk, unit, dtype, generator
        ctx.x, ctx.results = x, rows(x, row, lambda x: _off(x, 2 * unit, generator))
        return ctx.results[:-2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        row, walk, unit, dtype, generator = ctx.more
        entropy, lse, second_lse = ctx.results[1], *ctx.results[-2:]
        by_logprob, by_entropy, by_second, by_lse = (
            torch.zeros_like(lse) if grad is None else grad[:, None] for grad in grads[:4]
        )
        x = _off(ctx.x, walk, generator)
        if dtype in _NARROW:
            others = torch.rand(x.shape, generator=generator) < 1 / 16
            x = torch.where(others, _off(x, _NARROW[dtype], generator), x)
        logits, slope = x, torch.ones_like(x)
        if row.softcap is not None:
            tanh = torch.tanh(x / row.softcap)
            logits = _off(row.softcap * tanh, 2 * unit, generator)
            slope = 1 - tanh.square() + 4 * (_off(slope, unit, generator) - slope)
        target = torch.zeros_like(x).scatter_(1, row.targets, 1.0)

        def probabilities(temperature: Any, normaliser: Tensor) -> tuple[Tensor, Tensor]:
            logp = (logits / temperature - normaliser).clamp(min=-1e30)
            return logp, _off(logp.exp(), 4 * unit, generator)

        logp, p = probabilities(row.temperature, lse)
        found = by_logprob * (target - p) + by_lse * p - by_entropy * p * (logp + entropy[:, None])
        found = found / row.temperature
        if second_lse is not None:
            _, q = probabilities(row.second_temperature, second_lse)
            found = found + by_second * (target - q) / row.second_temperature
        return found * slope, None, None, None, None, None


def weighted(coefs: list[Tensor], outputs: list[Tensor | None]) -> Tensor:
    """The loss: sums of outputs times their coefficients."""
    terms = [(a * x).sum() for a, x in zip(coefs, outputs, strict=True) if x is not None]
    return torch.stack(terms).sum()


def check_within(
    found: Tensor, wanted: Tensor, moved: list[Tensor], unit: float, norm: float, what: str
) -> None:
    """Off by no more than the roundings of the module's text, in the norm of that order."""

    def size(x: Tensor) -> float:
        return torch.linalg.vector_norm(x, norm).item()

    assert found.shape == wanted.shape, what
    if not found.numel():
        return
    allowed = max(size(other - wanted) for other in moved) + unit * size(wanted)
    error = size(found.double() - wanted)
    assert math.isfinite(allowed), f"{what}: the truth is not finite"
    floor = _FLOORS[F64] if unit < 1e-10 else _FLOORS[F32]
    if found.dtype == F16:
        floor += size(torch.full_like(wanted, _HALF_SMALLEST))
    assert error <= allowed + floor, f"{what}: error {error:.3g} > {allowed:.3g}"
