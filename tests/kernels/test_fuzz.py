"""Options together, drawn at random, against float64: what tests of one option at a time miss.

Chunks and slices are small, so that all ways through them are taken. `make test` takes 300 draws;
`make fuzz DRAWS=10000 SEED=0` as many as it is told. A failure names its seed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from aepo_kernels import RowSampling, VocabShard, backends
from aepo_kernels.cpu import library as cpu_library
from tests.kernels.budgets import logprob_within, token_loss_within
from tests.kernels.fuzz.draw import F32, LAYOUTS, Draw, draw
from tests.kernels.fuzz.ranks import in_ranks
from tests.kernels.fuzz.truth import check_within, gemm_dtype, truth, unit_of, weighted
from tests.kernels.gpu_gemms import float16_as_on_a_gpu

DRAWS = int(os.environ.get("AEPO_FUZZ_DRAWS") or 300)
SEED = int(os.environ.get("AEPO_FUZZ_SEED") or 0)
_BATCH = 20
_MOST_NOISES = 32
_OUTPUTS = "log-prob", "entropy", "second log-prob", "lse", "sum of squares", "mean of logits"
_LEAVES = "hidden", "weight", "bias", "lora_a", "lora_b"


class Truth(NamedTuple):
    """Outputs and gradients in float64, in the order of `_OUTPUTS` and `_LEAVES`.

    The last output is how far the target's logit leads.
    """

    outputs: list[Tensor | None]
    grads: list[Tensor | None]


@contextmanager
def machine_of(case: Draw) -> Iterator[None]:
    """The CPU of a draw: its instruction set and its way of bfloat16 GEMMs."""
    with (
        patch.dict(os.environ, {cpu_library.ISA_VARIABLE: case.isa or ""}),
        patch.object(backends, "_has_amx", lambda: case.layout == "columns"),
        patch.object(backends, "_cpu_multiplies_bfloat16", lambda: case.layout != "upcast"),
        float16_as_on_a_gpu() if case.layout == "rows" else nullcontext(),
    ):
        yield


def fresh(case: Draw) -> list[Tensor | None]:
    """Leaves in the draw's own memory layouts."""
    leaves = [None if x is None else x.detach() for x in case.tensors]
    for leaf, wanted in zip(leaves, case.wants, strict=True):
        if leaf is not None:
            leaf.requires_grad_(wanted)
    return leaves


def run(case: Draw, leaves: list[Tensor | None], buffer: Tensor | None, **more: Any) -> list:
    """The call and its backward pass; returns the outputs as `truth` does."""
    hidden, weight, bias, lora_a, lora_b = leaves
    options = {**case.options, "bias": bias, "lora_a": lora_a, "lora_b": lora_b, **more}
    options |= {"ignore_index": case.ignored, "backend": case.backend}
    if buffer is not None:
        options["weight_grad"] = buffer
    sampling = options.pop("row_sampling", False)
    given: Any = case.budget, hidden, weight, case.targets
    if case.token_loss:
        options |= {"active": case.active}
        # So small a threshold keeps every row that has a gradient to speak of.
        how = RowSampling(1e-30, torch.Generator().manual_seed(case.seed))
        options["row_sampling"] = how if sampling else None
        output: Any = token_loss_within(
            *given,
            lambda *rest: weighted(list(rest[3:]), list(rest[:3])),
            *case.coefs[:3],
            **options,
        )
        loss, more = output.loss, [None] * 4
    else:
        squares = case.backend != "fused"
        options |= {"sum_squares": squares, "mean_logits": True, "is_top1": True}
        output = logprob_within(*given, **options)
        more = [output.lse, output.sum_squares, output.mean_logits, output.is_top1]
        results = output.logprob, output.entropy, output.second_logprob, output.lse
        loss = weighted(case.coefs, list(results))
    if loss.requires_grad:
        (case.factor * loss).backward()
    return [output.logprob, output.entropy, output.second_logprob, *more]


def run_all(case: Draw) -> tuple[list, list[Tensor | None]]:
    """Outputs, and gradients of whole tensors; the weight's may come from the caller's buffer."""
    start = case.buffer
    if case.bounds is None:
        leaves, buffer = fresh(case), None if start is None else start.clone()
        outputs = run(case, leaves, buffer)
        grads = [None if leaf is None else leaf.grad for leaf in leaves]
        return outputs, _with_buffer(grads, buffer)

    bounds = case.bounds

    def rank_of(number: int) -> tuple[list, list[Tensor | None]]:
        rows = slice(bounds[number], bounds[number + 1])
        leaves, shard = fresh(case), VocabShard(rows.start, bounds[-1])
        for index in (1, 2, 4):  # those with a row for each token of the vocabulary
            whole = leaves[index]
            if whole is not None:
                leaves[index] = whole.detach()[rows].requires_grad_(whole.requires_grad)
        buffer = None if start is None else start[rows].clone()
        outputs = run(case, leaves, buffer, shard=shard)
        return outputs, _with_buffer([None if x is None else x.grad for x in leaves], buffer)

    outputs, grads = zip(*in_ranks(len(bounds) - 1, rank_of), strict=True)
    for other in outputs[1:]:
        pairs = zip(outputs[0], other, strict=True)
        assert all(a is b or torch.equal(a, b) for a, b in pairs), "ranks differ"
    joined = list(grads[0])
    for index in (1, 2, 4):
        if joined[index] is not None:
            joined[index] = torch.cat([grad[index] for grad in grads])
    return list(outputs[0]), joined


def _with_buffer(grads: list[Tensor | None], buffer: Tensor | None) -> list[Tensor | None]:
    if buffer is not None:
        assert grads[1] is None, "the weight has a gradient beside weight_grad"
        grads[1] = buffer
    return grads


def check(case: Draw) -> None:
    """Raise AssertionError where a result is off by more than roundings explain.

    One set of random roundings tells most calls apart from wrong ones. Where few numbers decide a
    result, they may cancel, and many more sets are asked.
    """
    with machine_of(case):
        outputs, grads = run_all(case)
    exact, moved = truth_with_gradients(case), [truth_with_gradients(case, 0)]
    while True:
        try:
            return compare(case, outputs, grads, exact, moved)
        except AssertionError:
            if len(moved) >= _MOST_NOISES:
                raise
        count = len(moved)
        moved += [truth_with_gradients(case, noise) for noise in range(count, 2 * count)]


def truth_with_gradients(case: Draw, noise: int | None = None) -> Truth:
    outputs, leaves = truth(case, noise)
    coefs = [*case.coefs[:3], case.coefs[3] * (not case.token_loss)]
    (case.factor * weighted(coefs, outputs[:4])).backward()
    return Truth(outputs, [None if leaf is None else leaf.grad for leaf in leaves])


def compare(
    case: Draw,
    outputs: list[Tensor | None],
    grads: list[Tensor | None],
    exact: Truth,
    moved: list[Truth],
) -> None:
    unit = unit_of(case, gemm_dtype(case))
    assert (outputs[2] is None) == (exact.outputs[2] is None)
    results = (x[:-1] for x in (outputs, exact.outputs, *(x.outputs for x in moved)))
    for name, found, wanted, *near in zip(_OUTPUTS, *results, strict=True):
        if found is not None:
            masked = wanted == -torch.inf  # the mean of logits, where a column is -inf
            assert torch.equal(found == -torch.inf, masked), name
            found, wanted, *near = (x.masked_fill(masked, 0.0) for x in (found, wanted, *near))
            check_within(found.detach(), wanted, near, unit, math.inf, name)
    if outputs[-1] is not None:
        check_top1(outputs[-1], *(x.outputs[-1] for x in (exact, *moved)))  # type: ignore[arg-type]
    columns = zip(_LEAVES, case.tensors, case.wants, grads, strict=True)
    for index, (name, tensor, wants, found) in enumerate(columns):
        assert (found is not None) == (tensor is not None and wants), name
        if tensor is None or found is None:
            continue
        buffer = case.buffer if name == "weight" else None
        start = 0.0 if buffer is None else buffer.double()
        wanted, *near = (x.grads[index] + start for x in (exact, *moved))  # type: ignore[operator]
        leaf_unit = max(unit, unit_of(case, F32 if buffer is not None else tensor.dtype))
        check_within(found, wanted, near, leaf_unit, 2.0, f"gradient of {name}")


def check_top1(found: Tensor, lead: Tensor, *moved: Tensor) -> None:
    """The target has the largest logit where it leads by more than roundings explain, [N]."""
    offs = torch.stack([(other - lead).abs().nan_to_num(0.0) for other in moved])
    is_clear = lead.abs() > 2 * (offs.amax() if offs.numel() else 0.0)
    assert torch.equal(found[is_clear], lead[is_clear] > 0), "is_top1"


@pytest.mark.parametrize("start", range(SEED, SEED + DRAWS, _BATCH))
def test_against_float64(start: int) -> None:
    for seed in range(start, min(start + _BATCH, SEED + DRAWS)):
        case = draw(seed)
        try:
            check(case)
        except Exception as error:
            again = f"make fuzz DRAWS=1 SEED={seed}"
            raise AssertionError(f"{error}\nonce more: {again}\nthe call: {case}") from error


def test_a_draw_is_the_same_by_its_seed() -> None:
    one, other = draw(7), draw(7)
    assert str(one) == str(other)
    for a, b in zip(one.tensors, other.tensors, strict=True):
        assert a is b or torch.equal(a, b)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["temperature", "softcap", "logit_scale", "lora_scale"])
def test_what_is_wrong_by_a_thousandth_is_found(wrong: str) -> None:
    def counts(case: Draw) -> bool:
        rows, columns = len(case.targets), len(case.tensors[1])  # type: ignore[arg-type]
        has_number = isinstance(case.options.get(wrong), float) and gemm_dtype(case) == F32
        ignores_all = case.ignored is not None and bool((case.targets == case.ignored).all())
        is_loud = bool(case.coefs[0].any()) and not ignores_all
        return has_number and rows > 3 and columns > 30 and is_loud

    seed = next(seed for seed in range(1000) if counts(draw(seed)))
    changed = draw(seed)
    changed.options[wrong] *= 1.001
    with machine_of(changed):
        results = run_all(changed)
    with patch(f"{__name__}.run_all", lambda _: results), pytest.raises(AssertionError):
        check(draw(seed))


def test_the_draws_take_every_way() -> None:
    cases = [draw(seed) for seed in range(60)]
    assert {case.layout for case in cases} == set(LAYOUTS)
    for taken in (
        {case.backend for case in cases},
        {case.token_loss for case in cases},
        {case.buffer is None for case in cases},
        {case.bounds is None for case in cases},
        {case.active is None for case in cases},
        {case.tensors[0].dtype == torch.float16 for case in cases},  # type: ignore[union-attr]
    ):
        assert len(taken) > 1
