"""Options together, drawn at random, against float64: what tests of one option at a time miss.

Chunks and slices are small, so that all ways through them are taken.

What is allowed is the kernels' own rounding. The truth in float64 has the inputs that the GEMMs
get, rounded to hidden's dtype. It is computed again with all that the kernels write in that dtype
between their steps, the logits, their gradient and what passes through a LoRA's rank, off by a
whole unit u up or down at random: as far as a rounding can go. How far that moves a result, plus u
of the result for its own rounding, is allowed. Roundings are as random, and smaller: errors reach
about half of it.

For bfloat16, u = 2^-8, since sums are in float32 whose errors are far smaller: that allows 1% of
most gradients and 5% of the worst, where logits are large. For float32, u = 2^-24 sqrt(L), as a sum
of L terms is off by a random walk of L roundings; L is the longest sum, over tokens, the vocabulary
or hidden.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from aepo_kernels import RowSampling, backends
from aepo_kernels.head.plan import Budget
from tests.kernels.budgets import logprob_within, token_loss_within
from tests.kernels.oracle import IGNORED

F32, BF16 = torch.float32, torch.bfloat16
LORA_SCALE = 0.5


@dataclass
class Draw:
    """A call: tensors are hidden, weight, bias, lora_a and lora_b, None where there is none.

    coefs: the loss's derivatives by log-prob, entropy and second log-prob, [N] each.
    """

    rng: random.Random
    tensors: list[Tensor | None]
    targets: Tensor
    coefs: list[Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def draw(seed: int) -> Draw:
    """Shapes, dtypes and options of a call, all by the seed."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    count, vocab = rng.choice([0, 1, 3, 40, 150, 300]), rng.choice([1, 7, 31, 300, 2049, 6000])
    size, dtype = rng.choice([8, 33, 64]), rng.choice([F32, BF16, BF16])

    def normal(*shape: int, dtypes: tuple[torch.dtype, ...] = (F32, dtype)) -> Tensor:
        return torch.randn(*shape, generator=generator).to(rng.choice(dtypes))

    def temperature(number: float) -> float | Tensor:
        return rng.choice([number, torch.rand(count, generator=generator) + 0.5])

    weight = normal(vocab, size, dtypes=(dtype, dtype, dtype, F32, BF16)) * (2 / size**0.5)
    tensors: list[Tensor | None] = [normal(count, size, dtypes=(dtype,)), weight, None, None, None]
    if rng.random() < 0.3:
        tensors[2] = normal(vocab)
    options: dict[str, Any] = {}
    if rng.random() < 0.3:
        rank = rng.choice([1, 4, 9])
        tensors[3:] = normal(rank, size) / size**0.5, normal(vocab, rank)
        options["lora_scale"] = LORA_SCALE
    for name, value, chance in (
        ("temperature", temperature(0.7), 0.3),
        ("second_temperature", temperature(1.3), 0.4),
        ("softcap", 5.0, 0.3),
        ("logit_scale", 0.6, 0.3),
        ("chunk_tokens", rng.choice([1, 16, 50, 1000]), 0.3),
        ("weight_slice", rng.choice([64, 100, 5000, 100_000]), 0.25),
    ):
        if rng.random() < chance:
            options[name] = value
    targets = torch.randint(vocab, (count,), generator=generator)
    if rng.random() < 0.5:
        targets[torch.rand(count, generator=generator) < 0.3] = IGNORED
    elif rng.random() < 0.5:
        options["ignore_index"] = None
    coefs = [torch.randn(count, generator=generator) / max(count, 1) for _ in range(3)]
    passive = torch.rand(count, generator=generator) < rng.choice([0.0, 0.3, 0.95, 1.0])
    for coef in coefs:
        coef[passive] = 0
    return Draw(rng, tensors, targets, coefs, options)


def small_budget(rng: random.Random, vocab: int, size: int) -> Budget:
    """Budgets of memory that make several chunks, slices and blocks of a small call."""
    names = {}
    for name, values in (
        ("chunk_bytes", [32 * vocab, 96 * vocab, 2**23 + 128 * vocab]),
        ("slice_bytes", [2**12, 2**16, 2**20]),
        ("stash_bytes", [0, 40 * vocab, 2**25]),
        ("sum_bytes", [0, 200 * size, 2**25, 2**25]),
        ("stats_columns", [2048, 4096, 16384]),
        ("stats_tokens", [16, 64, 256]),
    ):
        names[name] = rng.choice(values)
    names["block_sum_bytes"] = rng.choice([256 * size, 2**24])
    return Budget(**names, block_tokens=rng.choice([64, 1024]))


def laid(rng: random.Random, matrix: Tensor) -> Tensor:
    """The same matrix by rows, by columns, or with other memory between its rows."""
    how = rng.choice(["rows", "rows", "columns", "apart"])
    if how == "columns":
        return matrix.T.contiguous().T
    if how == "rows":
        return matrix.clone()
    wide = torch.full((len(matrix), 2 * matrix.shape[1] + 1), torch.nan, dtype=matrix.dtype)
    wide[:, : matrix.shape[1]] = matrix
    return wide[:, : matrix.shape[1]]


class Rounded(torch.autograd.Function):
    """Numbers and their gradients, each off by `unit` of itself, up or down at random."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: float, generator: torch.Generator) -> Tensor:
        ctx.unit, ctx.generator = unit, generator
        return off(x, unit, generator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return off(grad, ctx.unit, ctx.generator), None, None


def unit_of(case: Draw, dtype: torch.dtype) -> float:
    """The largest rounding of a number of the call in `dtype`, as a share of it: see the module."""
    if dtype == BF16:
        return 2.0**-8
    hidden, weight = case.tensors[:2]
    assert hidden is not None and weight is not None
    return 2.0**-24 * max(*hidden.shape, *weight.shape) ** 0.5


def off(x: Tensor, unit: float, generator: torch.Generator) -> Tensor:
    signs = torch.randint(2, x.shape, generator=generator) * 2 - 1
    return x * (1 + unit * signs)


def truth(case: Draw, seed: int | None = None) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Log-prob, entropy and second log-prob, and the leaves, in float64.

    With a seed, what the kernels write between their steps is off by its largest rounding.
    """
    options, dtype = case.options, case.tensors[0].dtype
    unit = unit_of(case, dtype)
    generator = torch.Generator().manual_seed(seed or 0)

    def written(x: Tensor) -> Tensor:
        return x if seed is None else Rounded.apply(x, unit, generator)

    # GEMMs take their operands in hidden's dtype.
    narrow = [x if x is None or i == 2 else x.to(dtype) for i, x in enumerate(case.tensors)]
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in narrow]
    hidden, weight, bias, down, up = leaves
    assert hidden is not None and weight is not None
    logits = written(hidden @ weight.T)
    if down is not None and up is not None:
        logits = written(logits + written(LORA_SCALE * written(hidden @ down.T)) @ up.T)
    logits = (logits if bias is None else logits + bias) * options.get("logit_scale", 1.0)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    keep = case.targets != IGNORED
    index = torch.where(keep, case.targets, 0)[:, None]

    def distribution(temperature: float | Tensor) -> Tensor:
        if isinstance(temperature, Tensor):
            temperature = temperature.double()[:, None]
        return torch.log_softmax(logits / temperature, -1)

    first, second = distribution(options.get("temperature", 1.0)), options.get("second_temperature")
    outputs = [
        first.gather(1, index)[:, 0],
        torch.special.entr(first.exp()).sum(-1),
        None if second is None else distribution(second).gather(1, index)[:, 0],
    ]
    return [None if x is None else x.where(keep, 0.0) for x in outputs], leaves


def weighted(coefs: list[Tensor], outputs: list[Tensor | None]) -> Tensor:
    pairs = zip(coefs, outputs, strict=True)
    return sum(((a * x).sum() for a, x in pairs if x is not None), torch.zeros(()))


def run(
    case: Draw,
    leaves: list[Tensor | None],
    budget: Budget,
    *,
    grad: Tensor | None,
    factor: float,
) -> list:
    """The call and its backward pass; returns the three outputs."""
    options = {**case.options, "bias": leaves[2], "lora_a": leaves[3], "lora_b": leaves[4]}
    given = leaves[0], leaves[1], case.targets
    if grad is not None:
        options["weight_grad"] = grad
    if case.rng.random() < 0.3:
        output = logprob_within(budget, *given, **options)
        outputs = [output.logprob, output.entropy, output.second_logprob]
        loss = weighted(case.coefs, outputs)
    else:
        if case.rng.random() < 0.4:
            active = (case.coefs[0] != 0).nonzero().squeeze(1)
            options["active"] = active[torch.randperm(len(active))]
        if case.rng.random() < 0.2 and "weight_slice" not in options:
            options["row_sampling"] = RowSampling(1e-12)  # keeps every row
        output = token_loss_within(
            budget,
            *given,
            lambda *rest: weighted(list(rest[3:]), list(rest[:3])),
            *case.coefs,
            **options,
        )
        outputs, loss = [output.logprob, output.entropy, output.second_logprob], output.loss
    if loss.requires_grad:
        (factor * loss).backward()
    return outputs


def within(
    found: Tensor, wanted: Tensor, moved: list[Tensor], unit: float, norm: float, seed: int
) -> None:
    """Off by no more than the roundings of the module's text, in the norm of that order."""

    def size(x: Tensor) -> float:
        return torch.linalg.vector_norm(x, norm).item()

    allowed = max(size(other - wanted) for other in moved) + unit * size(wanted)
    # Where the truth is zero, float32 sums that cancel leave a rounding of their terms.
    error = size(found.double() - wanted)
    assert error <= allowed + 1e-6, (seed, error, allowed)


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("start", range(0, 120, 10))
def test_against_float64(start: int) -> None:
    for seed in range(start, start + 10):
        case = draw(seed)
        rng, (hidden, weight, *others) = case.rng, case.tensors
        assert hidden is not None and weight is not None
        budget = small_budget(rng, *weight.shape)
        wants = [rng.random() < 0.85 for _ in case.tensors]
        leaves = [laid(rng, hidden), laid(rng, weight), *others]
        for leaf, wanted in zip(leaves, wants, strict=True):
            if leaf is not None:
                leaf.grad = None
                leaf.requires_grad_(wanted)
        into_buffer = wants[1] and "weight_slice" not in case.options and rng.random() < 0.2
        buffer = torch.zeros(weight.shape) if into_buffer else None
        factor = 1.0 if into_buffer else rng.choice([1.0, -2.5])
        outputs = run(case, leaves, budget, grad=buffer, factor=factor)
        exact, exact_leaves = truth(case)
        moved, moved_leaves = zip(*(truth(case, noise) for noise in range(2)), strict=True)
        for some in exact, *moved:
            (factor * weighted(case.coefs, some)).backward()
        unit = unit_of(case, hidden.dtype)
        for found, wanted, *near in zip(outputs, exact, *moved, strict=True):
            assert (found is None) == (wanted is None), seed
            if found is not None and wanted is not None and len(found):
                within(found, wanted, near, unit, math.inf, seed)
        found_grads = [None if leaf is None else leaf.grad for leaf in leaves]
        if buffer is not None:
            assert found_grads[1] is None, seed
            found_grads[1] = buffer
        columns = zip(leaves, found_grads, exact_leaves, *moved_leaves, strict=True)
        for leaf, found, exact_leaf, *near in columns:
            assert (found is not None) == (leaf is not None and leaf.requires_grad), seed
            if leaf is None or found is None or exact_leaf is None:
                continue
            grads = [other.grad for other in near]
            leaf_unit = max(unit, unit_of(case, leaf.dtype))
            within(found, exact_leaf.grad, grads, leaf_unit, 2.0, seed)


def test_the_layouts_are_all_taken(layout: str) -> None:
    assert backends.gemms_want_column_major(torch.empty(1, 1, dtype=BF16)) == (layout == "columns")
