"""`linear_logprob` by chunks: forward keeps statistics, backward makes logits again (4 GEMMs).

With a frozen head, forward also writes the gradient's direction by each row of hidden. Backward
then only scales the rows (2 GEMMs). See `plan.direction_of`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aepo_kernels.backends import is_readable_at_once
from aepo_kernels.gemm import computing_on
from aepo_kernels.head.budget import DEFAULT_BUDGET, Budget
from aepo_kernels.head.passes import pass_of
from aepo_kernels.head.plan import Plan, direction_of, make_plan
from aepo_kernels.head.projection import Head, head_of
from aepo_kernels.head.scaling import scale_rows
from aepo_kernels.head.tokens import Tokens, tokens_of
from aepo_kernels.problem import OUTPUTS, LogprobOutput, Problem
from aepo_kernels.ranges import slices, take
from aepo_kernels.rows.interface import RowCoefs, RowStats
from aepo_kernels.tensors import first_order


def logprob(problem: Problem, budget: Budget = DEFAULT_BUDGET) -> LogprobOutput:
    """`linear_logprob`: backward scales a direction, or makes the logits again."""
    rows: Any = _Logprob.apply(problem, budget, direction_of(problem), *problem.inputs)
    *values, mean, top1 = rows
    names = problem.backend, problem.row_kernels
    return LogprobOutput(*values, *names, mean, top1)  # type: ignore[arg-type]


def forward(
    problem: Problem, direction: str | None = None, budget: Budget = DEFAULT_BUDGET
) -> tuple[Tokens, RowStats, Tensor | None]:
    """The M tokens that are not ignored, the statistics of their rows, [M] each, and a direction.

    direction: the output whose derivative by hidden is the direction, [N, H] and 0 at ignored
    tokens; None makes none.
    """
    with computing_on(problem.hidden):
        plan = make_plan(problem, direction=direction, budget=budget)
        head, tokens = head_of(problem, plan), tokens_of(problem)
        if direction is not None:
            return tokens, *_with_direction(problem, plan, head, tokens)
        count, size = len(tokens.targets), plan.stats_tokens
        workspace = head.stats_workspace(min(count, size))
        parts = [head.stats_alone(tokens.at(index), workspace) for index in slices(count, size)]
        return tokens, join_stats(parts, head, tokens), None


def _with_direction(
    problem: Problem, plan: Plan, head: Head, tokens: Tokens
) -> tuple[RowStats, Tensor | None]:
    """Statistics, [M] each, and the direction, [N, H]: the gradient of the output's plain sum."""
    gradients = pass_of(problem, plan, head, (True, False, False, False, False))
    parts: list[RowStats] = []
    for index in gradients.chunks(len(tokens.targets), len(tokens.targets)):
        chunk = tokens.at(index)
        stats = gradients.forward(chunk, True)
        ones = torch.ones_like(stats.logprob)  # [C]
        given = [ones if name == plan.direction else None for name in OUTPUTS]
        gradients.backward(chunk, stats, RowCoefs(*given))
        parts.append(stats)
    return join_stats(parts, head, tokens), gradients.finish().hidden


def alone(direction: str, grads: Sequence[Tensor | None]) -> Tensor | None:
    """The gradient by the direction's output, [N], or None where another output has one, too.

    grads: by the four outputs, [N] each or None.
    """
    found = [name for name, x in zip(OUTPUTS, grads, strict=False) if x is not None]
    if found == [direction]:
        return grads[OUTPUTS.index(direction)]
    if not found:
        return None
    warnings.warn(
        f"linear_logprob: a gradient came by {' and '.join(found)}, and the forward pass over this "
        f"frozen head was ready for {direction} alone, so the logits are made again (4 GEMMs); "
        f"pass grad_of=({', '.join(map(repr, found))},), which takes {min(len(found), 2) + 1}",
        stacklevel=2,
    )
    return None


def _without_zeros(direction: str, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients, with None for another output's that is all zeros, as of an entropy times 0.

    On a GPU, looking would wait for the device.
    """
    return [
        x if x is None or name == direction or not is_readable_at_once(x) or x.any() else None
        for name, x in zip(OUTPUTS, grads[:4], strict=True)
    ]


def backward(
    problem: Problem,
    tokens: Tokens,
    stats: RowStats,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    budget: Budget = DEFAULT_BUDGET,
) -> tuple[Tensor | None, ...]:
    """Gradients of the problem's inputs. grads: of the four outputs, [N] each or None."""
    with computing_on(problem.hidden):
        count = len(tokens.targets)
        plan = make_plan(problem, needs_weight=needs[1], rows=count, budget=budget)
        gradients = pass_of(problem, plan, head_of(problem, plan), tuple(needs))
        coefs = [None if grad is None else take(grad, tokens.positions) for grad in grads]  # [M]
        gradients.backward(tokens, stats, RowCoefs(*coefs))
        return gradients.finish().results()


def outputs(problem: Problem, tokens: Tokens, stats: RowStats) -> tuple[Tensor | None, ...]:
    """Log-prob, entropy, lse and second log-prob, [N], 0 at ignored positions."""
    lse = stats.max_logit * tokens.inv_temperature + stats.log_sum
    values = stats.logprob, stats.entropy, lse, stats.second_logprob
    return tuple(None if x is None else problem.spread(x, tokens.positions) for x in values)


def plain_outputs(problem: Problem, tokens: Tokens, stats: RowStats) -> tuple[Tensor | None, ...]:
    """Sum of squares, mean of logits / T and is_top1, as asked for: [N] without a gradient."""
    mean = top1 = None
    if problem.mean_logits and stats.logit_sum is not None:
        mean = stats.logit_sum * tokens.inv_temperature / problem.vocab
    if problem.is_top1 and stats.is_top1 is not None:
        top1 = (stats.is_top1 != 0) & ~stats.log_sum.isnan()  # beside NaN, nothing is the largest
    values = stats.sum_squares, mean, top1
    return tuple(None if x is None else problem.spread(x, tokens.positions) for x in values)


def join_stats(parts: list[RowStats], head: Head, tokens: Tokens) -> RowStats:
    """The statistics of several chunks as one; empty tensors where there are none."""
    if parts:
        columns = zip(*parts, strict=True)
        joined = [None if column[0] is None else torch.cat(column) for column in columns]
        return RowStats(*joined)  # type: ignore[arg-type]
    empty = torch.zeros(0, dtype=head.plan.stats_dtype, device=head.hidden.device)
    second = None if tokens.second_inv_temperature is None else empty
    squares, logits = empty if head.squares else None, empty if head.logit_stats else None
    return RowStats(empty, empty, empty, empty, second, second, squares, logits, logits)


class _Logprob(torch.autograd.Function):
    """Forward keeps [N] statistics; backward recomputes the logits of the rows that need it.

    With a direction, forward keeps this one, too, and backward scales its rows.
    """

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, budget: Budget, direction: str | None, *inputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.budget, ctx.direction = budget, direction
        ctx.tokens, ctx.stats, along = forward(problem, direction, budget)
        # The inputs go through save_for_backward alone, so that saved-tensor hooks and the check
        # against in-place changes see them. So do the targets, whose memory `tokens` may share.
        # With `grad_of`, the direction is all that backward reads.
        kept = [None] * len(inputs) if direction is not None and problem.grad_of else inputs
        ctx.save_for_backward(along, *kept, problem.targets)
        nothing = problem.hidden.new_empty(0)
        ctx.problem = problem.with_inputs([nothing, nothing, None, None, None])
        # Copies, since ctx holds the statistics: a caller may write to what it gets, and an output
        # that its own node holds would never be freed.
        found = outputs(problem, ctx.tokens, ctx.stats)
        plain = plain_outputs(problem, ctx.tokens, ctx.stats)
        values = [None if value is None else value.clone() for value in (*found, *plain)]
        ctx.mark_non_differentiable(*(x for x in values[len(found) :] if x is not None))
        return tuple(values)

    @staticmethod
    @first_order("linear_logprob", 'use backend="reference", which is plain autograd')
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        along, *inputs, _ = ctx.saved_tensors
        grad = None
        if along is not None:
            grad = alone(ctx.direction, _without_zeros(ctx.direction, grads))
        if along is not None and grad is not None:
            # What comes at an ignored token does not count, be it NaN.
            positions = ctx.tokens.positions
            factor = ctx.problem.spread(take(grad, positions), positions)  # [N]
            by_hidden = scale_rows(along, factor, ctx.problem.hidden.dtype)
            return None, None, None, by_hidden, None, None, None, None
        problem: Problem = ctx.problem.with_inputs(inputs)
        needs, known = ctx.needs_input_grad[3:], (ctx.tokens, ctx.stats)
        return None, None, None, *backward(problem, *known, grads[:4], needs, ctx.budget)
