"""`linear_token_loss` by chunks of tokens, so that [N, V] logits never exist: chunked and fused.

A chunk takes one GEMM for its logits and one read of the logits for row statistics. The loss's
derivatives are known within the chunk. So where gradients are wanted, the logits become their own
gradient, and two more GEMMs follow. The fused backend has no logits in its forward pass and makes
them again (4 GEMMs).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aepo_kernels.gemm import computing_on
from aepo_kernels.head.accumulators import Gradients
from aepo_kernels.head.budget import DEFAULT_BUDGET, Budget
from aepo_kernels.head.logprob import join_stats, outputs
from aepo_kernels.head.passes import pass_of
from aepo_kernels.head.plan import make_plan
from aepo_kernels.head.projection import head_of
from aepo_kernels.head.tokens import Tokens, tokens_of
from aepo_kernels.loss_checks import check_closure, check_loss
from aepo_kernels.problem import Problem, TokenLoss, TokenLossOutput, sum_losses
from aepo_kernels.ranges import take
from aepo_kernels.rows.interface import RowCoefs, RowStats
from aepo_kernels.tensors import first_order, without_saved_tensor_hooks

_NOTHING = RowCoefs(None, None, None, None)


def token_loss(
    problem: Problem,
    loss_fn: TokenLoss,
    token_tensors: tuple[Tensor, ...],
    budget: Budget = DEFAULT_BUDGET,
) -> TokenLossOutput:
    """`linear_token_loss`: gradients are computed here, and backward only scales them."""
    inputs, needs = problem.inputs, problem.needs
    with torch.no_grad(), computing_on(problem.hidden), without_saved_tensor_hooks():
        tokens, num_active = _active_first(problem, tokens_of(problem))  # [M]
        num_active = num_active if any(needs) else 0
        plan = make_plan(problem, needs_weight=needs[1], rows=num_active, budget=budget)
        head = head_of(problem, plan)
        gradients = pass_of(problem, plan, head, needs)
        loss = torch.zeros((), dtype=plan.stats_dtype, device=problem.hidden.device)
        metrics: dict[str, Tensor] = {}
        parts: list[RowStats] = []
        for index in gradients.chunks(num_active, len(tokens.targets)):
            chunk, has_grad = tokens.at(index), index.start < num_active
            stats = gradients.forward(chunk, has_grad)  # each [C]
            columns = [take(tensor, chunk.positions) for tensor in token_tensors]  # [C, ...]
            if problem.check_loss and not parts:
                check_loss(loss_fn, (stats.logprob, stats.entropy, stats.second_logprob), columns)
            chunk_loss, chunk_metrics, coefs = _evaluate(
                loss_fn, stats, columns, has_grad, first=not parts
            )
            loss += chunk_loss
            _add_metrics(metrics, chunk_metrics)
            if has_grad:
                gradients.backward(chunk, stats, coefs)  # coefs: each [C]
            parts.append(stats)
        total = gradients.total
        if any(needs):
            gradients.finish()
            metrics |= total.sampling_metrics()
        joined = join_stats(parts, head, tokens)  # each [M]
        first, entropy, _, second = outputs(problem, tokens, joined)  # [N]
    if any(needs):
        loss = _AttachGradients.apply(loss, total, *inputs)
    return TokenLossOutput(
        loss,  # type: ignore[arg-type]
        metrics,
        first,  # type: ignore[arg-type]
        entropy,  # type: ignore[arg-type]
        second,
        problem.backend,
        problem.row_kernels,
        total.rows,
    )


class _AttachGradients(torch.autograd.Function):
    """Gives the loss, [], the gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, total: Gradients, *inputs: Tensor | None) -> Tensor:
        ctx.total = total
        return loss.clone()

    @staticmethod
    @first_order("linear_token_loss", 'use backend="reference", which is plain autograd')
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.total is None:
            raise RuntimeError(
                "linear_token_loss: backward ran a second time, but its gradients were scaled in "
                "place by the first; call linear_token_loss again, or add losses before backward"
            )
        total, ctx.total = ctx.total, None
        if total.in_place:
            torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
                grad == 1,
                "linear_token_loss: weight_grad already holds the gradient of the loss itself, but "
                "backward came with a factor; put the factor inside token_loss",
            )
        return None, None, *total.results(grad)


def _evaluate(
    loss_fn: TokenLoss, stats: RowStats, slices: list[Tensor], wants_grad: bool, *, first: bool
) -> tuple[Tensor, dict[str, Tensor], RowCoefs]:
    """Run the token loss on a chunk and differentiate it by log-prob, entropy and second log-prob.

    stats: each [C]. slices: [C, ...]. first: look at what else the loss reads. Returns the chunk's
    loss, its metrics and coefficients, [C] each.
    """
    values = stats.logprob, stats.entropy, stats.second_logprob
    if not wants_grad:
        loss, metrics = sum_losses(loss_fn(*values, *slices))
        return loss, metrics, _NOTHING
    leaves = [None if x is None else x.detach().requires_grad_() for x in values]
    with torch.enable_grad():
        loss, metrics = sum_losses(loss_fn(*leaves, *slices))
    used = [leaf for leaf in leaves if leaf is not None]
    found: list[Tensor | None] = [None, None, None]
    if loss.requires_grad:
        if first:
            check_closure(loss, leaves)
        found[: len(used)] = torch.autograd.grad(loss, used, allow_unused=True)
    metrics = {name: value.detach() for name, value in metrics.items()}
    return loss.detach(), metrics, RowCoefs(found[0], found[1], None, found[2])


def _add_metrics(total: dict[str, Tensor], part: dict[str, Tensor]) -> None:
    for name, value in part.items():
        total[name] = total[name] + value if name in total else value


def _active_first(problem: Problem, tokens: Tokens) -> tuple[Tokens, int]:
    """Active tokens, then the others; and the number of active ones."""
    if problem.active is None:
        return tokens, len(tokens.targets)
    others = torch.ones(len(problem.targets), dtype=torch.bool, device=tokens.targets.device)
    others.index_fill_(0, problem.active, False)  # others[active] = False would wait for a GPU
    num_active = len(problem.active)
    if isinstance(tokens.positions, Tensor):  # finding the ignored tokens has waited already
        others = others[tokens.positions]
        num_active = int((~others).sum())
    return tokens.at(others.to(torch.uint8).argsort(stable=True)), num_active
