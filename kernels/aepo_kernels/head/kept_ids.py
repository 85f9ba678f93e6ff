"""Heads of a truncated distribution: of each row, only the ids that the sampler has kept.

A row's K kept rows of the weight are gathered, [C, K, H], and no GEMM has the size of the
vocabulary: N x K x H multiply-adds instead of N x V x H. Everything is in float32 (float64 for
float64 hidden). Backward gathers again, and adds to the weight's gradient in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aepo_kernels import reference
from aepo_kernels.backends import is_readable_at_once
from aepo_kernels.head.budget import DEFAULT_BUDGET, Budget
from aepo_kernels.problem import LogprobOutput, Problem, TokenLoss, TokenLossOutput
from aepo_kernels.ranges import part_of, slices, take
from aepo_kernels.tensors import first_order


def logprob(problem: Problem, budget: Budget = DEFAULT_BUDGET) -> LogprobOutput:
    """`linear_logprob` of softmax over the kept ids alone."""
    return reference.logprob(problem, partial(_rows, budget))


def token_loss(
    problem: Problem,
    loss_fn: TokenLoss,
    token_tensors: tuple[Tensor, ...],
    budget: Budget = DEFAULT_BUDGET,
) -> TokenLossOutput:
    """`linear_token_loss` of softmax over the kept ids alone: all tokens are one chunk."""
    return reference.token_loss(problem, loss_fn, token_tensors, partial(_rows, budget))


def _rows(budget: Budget, problem: Problem, positions: Tensor | None) -> reference.Rows:
    """The rows of the M tokens at some positions, [M] or None for all, differentiable."""
    found = _KeptRows.apply(budget, problem, positions, *problem.inputs)
    return reference.Rows(*found, None, None, None)  # type: ignore[misc]


class _KeptRows(torch.autograd.Function):
    """Log-prob, entropy, lse and second log-prob, [M] each, from the inputs of a problem."""

    @staticmethod
    def forward(
        ctx: Any, budget: Budget, problem: Problem, positions: Tensor | None, *inputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.budget, ctx.positions = budget, positions
        ctx.save_for_backward(*inputs, problem.targets, problem.kept_ids)
        nothing = problem.hidden.new_empty(0)
        ctx.problem = problem.with_inputs([nothing, nothing, None, None, None])
        parts = [_values(problem, chunk) for chunk in _chunks(problem, positions, budget)]
        if not parts:
            empty = problem.hidden.new_empty(0, dtype=problem.stats_dtype)
            second = None if problem.second_temperature is None else empty.clone()
            return empty, empty.clone(), empty.clone(), second
        columns = zip(*(part[:4] for part in parts), strict=True)
        return tuple(None if x[0] is None else torch.cat(x) for x in columns)  # type: ignore[arg-type]

    @staticmethod
    @first_order("kept_ids", 'use backend="reference", which is plain autograd')
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, _, _ = ctx.saved_tensors
        problem: Problem = ctx.problem.with_inputs(inputs)
        sums = _Sums(problem, ctx.needs_input_grad[3:])
        if any(grad is not None for grad in grads):
            for chunk in _chunks(problem, ctx.positions, ctx.budget):
                some = [None if grad is None else grad[chunk.index] for grad in grads]
                sums.add(chunk, _dlogits(problem, chunk, some))
        return None, None, None, *sums.results()


class _Chunk(NamedTuple):
    """Some tokens of the batch with their kept ids, sorted so that the padding comes last.

    index: of the M tokens. positions: in the batch. inputs: hidden, [C, H], in the statistics'
    dtype. ids: rows of the weight, [C, K]. outside: [C, K], padding and repeated ids. columns:
    slices of the K ids whose rows of the weight are gathered at once. targets: columns, [C].
    raw_logits: [C, K], all NaN in a row whose target or ids are wrong.
    """

    index: slice
    positions: Tensor | slice
    inputs: Tensor
    ids: Tensor
    outside: Tensor
    columns: list[slice]
    targets: Tensor
    raw_logits: Tensor


def _chunks(problem: Problem, positions: Tensor | None, budget: Budget) -> Iterator[_Chunk]:
    """The tokens at some positions, [M] or None for all, as many at once as the budget holds."""
    assert problem.kept_ids is not None
    everything = slice(0, len(problem.targets)) if positions is None else positions
    count = len(problem.targets) if positions is None else len(positions)
    held = budget.gpu_kept_bytes if problem.hidden.is_cuda else budget.kept_bytes
    # Gathered rows, the same rows in the statistics' dtype, and their gradient.
    width = max(1, problem.hidden.shape[1]) * 3 * problem.stats_dtype.itemsize
    rows = max(1, held // width)
    size = max(1, rows // problem.kept_ids.shape[1])
    for index in slices(count, min(size, problem.chunk_tokens or size)):
        yield _chunk(problem, index, part_of(everything, index), rows)


def _chunk(problem: Problem, index: slice, positions: Tensor | slice, rows: int) -> _Chunk:
    assert problem.kept_ids is not None
    dtype, vocab = problem.stats_dtype, len(problem.weight)
    ids = take(problem.kept_ids, positions).sort(1, descending=True).values  # [C, K]
    if is_readable_at_once(ids):  # no look at a GPU's ids: it would wait
        ids = ids[:, : max(1, int((ids >= 0).sum(1).max()))]
    outside = ids < 0
    outside[:, 1:] |= ids[:, 1:] == ids[:, :-1]
    own = take(problem.targets, positions)[:, None]  # [C, 1]
    is_target = (ids == own) & ~outside
    wrong = (ids >= vocab).any(1) | ~is_target.any(1)  # [C]
    columns = list(slices(ids.shape[1], max(1, rows // len(ids))))
    # Padding reads the target's row, so that no number of another row can reach this one.
    ids = torch.where(outside, own, ids).clamp(0, vocab - 1)
    inputs = take(problem.hidden, positions).to(dtype)  # [C, H]
    low_rank = _low_rank(problem, inputs)
    parts = []
    for some in columns:
        part = torch.bmm(_gathered(problem.weight, ids[:, some], dtype), inputs[:, :, None])
        if low_rank is not None:
            part += torch.bmm(_gathered(problem.lora_b, ids[:, some], dtype), low_rank[:, :, None])
        parts.append(part.squeeze(2))
    raw_logits = torch.cat(parts, 1)  # [C, K]
    if problem.bias is not None:
        raw_logits += problem.bias[ids].to(dtype)
    raw_logits.masked_fill_(wrong[:, None], torch.nan)
    targets = is_target.to(torch.uint8).argmax(1)
    return _Chunk(index, positions, inputs, ids, outside, columns, targets, raw_logits)


def _gathered(matrix: Tensor | None, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a matrix [V, H] at ids [C, K], as [C, K, H] in `dtype`."""
    assert matrix is not None
    return matrix.index_select(0, ids.flatten()).to(dtype).view(*ids.shape, matrix.shape[1])


def _low_rank(problem: Problem, inputs: Tensor) -> Tensor | None:
    """lora_scale * inputs [C, H] @ lora_a.T, [C, R]; None without LoRA."""
    if problem.lora_a is None:
        return None
    return inputs @ problem.lora_a.to(inputs.dtype).T * problem.lora_scale


def _values(problem: Problem, chunk: _Chunk) -> reference.Rows:
    given = chunk.raw_logits, chunk.targets, chunk.outside
    return reference.rows_of_logits(problem, chunk.positions, *given)


def _dlogits(problem: Problem, chunk: _Chunk, grads: list[Tensor | None]) -> Tensor:
    """The gradient by a chunk's raw logits, [C, K]. grads: by its four results, [C] or None."""
    chunk.raw_logits.requires_grad_()
    with torch.enable_grad():
        values = _values(problem, chunk)[:4]
    pairs = [
        (x, grad)
        for x, grad in zip(values, grads, strict=True)
        if x is not None and grad is not None
    ]
    outputs, known = zip(*pairs, strict=True)
    (found,) = torch.autograd.grad(outputs, chunk.raw_logits, known)
    return found


class _Sums:
    """Gradients of a problem's inputs, added up over chunks in the statistics' dtype."""

    def __init__(self, problem: Problem, needs: tuple[bool, ...]) -> None:
        self.problem = problem
        dtypes = problem.hidden.dtype, *[problem.stats_dtype] * 4
        self.hidden, self.weight, self.bias, self.lora_a, self.lora_b = (
            torch.zeros(x.shape, dtype=dtype, device=x.device) if x is not None and need else None
            for x, need, dtype in zip(problem.inputs, needs, dtypes, strict=True)
        )

    def add(self, chunk: _Chunk, dlogits: Tensor) -> None:
        """Add a chunk. dlogits: [C, K]."""
        problem, dtype = self.problem, dlogits.dtype
        low_rank = _low_rank(problem, chunk.inputs)
        by_inputs = torch.zeros_like(chunk.inputs)  # [C, H]
        by_low_rank = None if low_rank is None else torch.zeros_like(low_rank)  # [C, R]
        for some in chunk.columns:
            ids, part = chunk.ids[:, some], dlogits[:, some]
            if self.hidden is not None:
                by_inputs += _times_rows(part, _gathered(problem.weight, ids, dtype))
            if self.weight is not None:
                _add_rows(self.weight, ids, part[:, :, None] * chunk.inputs[:, None])
            if by_low_rank is not None and low_rank is not None:
                by_low_rank += _times_rows(part, _gathered(problem.lora_b, ids, dtype))
                if self.lora_b is not None:
                    _add_rows(self.lora_b, ids, part[:, :, None] * low_rank[:, None])
        if self.bias is not None:
            _add_rows(self.bias, chunk.ids, dlogits)
        if by_low_rank is not None and problem.lora_a is not None:
            by_low_rank *= problem.lora_scale
            by_inputs += by_low_rank @ problem.lora_a.to(dtype)
            if self.lora_a is not None:
                self.lora_a.addmm_(by_low_rank.T, chunk.inputs)
        if self.hidden is not None:
            self.hidden[chunk.positions] = by_inputs.to(self.hidden.dtype)

    def results(self) -> tuple[Tensor | None, ...]:
        """The gradients in their inputs' dtypes, None where one is not needed."""
        sums = self.hidden, self.weight, self.bias, self.lora_a, self.lora_b
        pairs = zip(sums, self.problem.inputs, strict=True)
        return tuple(None if x is None or like is None else x.to(like.dtype) for x, like in pairs)


def _times_rows(dlogits: Tensor, rows: Tensor) -> Tensor:
    """Each token's dlogits [C, K] times its own rows [C, K, H], [C, H]."""
    return torch.bmm(dlogits[:, None], rows).squeeze(1)


def _add_rows(total: Tensor, ids: Tensor, values: Tensor) -> None:
    """Add values [C, K, ...] to the rows of a total [V, ...] at ids [C, K], in a fixed order."""
    ids, values = ids.flatten(), values.flatten(0, 1)
    if total.is_cuda:  # index_add_ has atomics there, and this sorts
        total.index_put_((ids,), values, accumulate=True)
    else:
        total.index_add_(0, ids, values)
