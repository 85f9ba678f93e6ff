"""Logits of a few tokens at a time, so that [N, V] never exists: backends chunked and fused.

Per chunk: one GEMM for the logits, fused row statistics, and, where gradients are wanted, the
logits' gradient in place and two more GEMMs. `linear_token_loss` knows the loss's derivatives
within the chunk (3 GEMMs); `linear_logprob` learns them in backward and recomputes (4 GEMMs). The
fused backend never has logits in its forward pass, and so recomputes for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aepo_kernels.chunks import (
    Head,
    Tokens,
    chunk_size,
    forward_chunk_size,
    head_of,
    slices,
    tokens_of,
)
from aepo_kernels.gemm import exact_sums
from aepo_kernels.gradients import Gradients
from aepo_kernels.problem import (
    LogprobOutput,
    Problem,
    TokenLoss,
    TokenLossOutput,
    sum_losses,
    take,
)
from aepo_kernels.rows import RowCoefs, RowStats

_NOTHING = RowCoefs(None, None, None, None)


def logprob(problem: Problem) -> LogprobOutput:
    """`linear_logprob`, recomputing logits in backward."""
    rows = _Logprob.apply(problem.hidden, problem.weight, problem.bias, problem)
    return LogprobOutput(*rows, problem.backend)  # type: ignore[misc]


def token_loss(
    problem: Problem, loss_fn: TokenLoss, token_tensors: tuple[Tensor, ...]
) -> TokenLossOutput:
    """`linear_token_loss`, with gradients computed here and only scaled in backward."""
    inputs = problem.hidden, problem.weight, problem.bias
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    with torch.no_grad(), torch.autocast(problem.hidden.device.type, enabled=False), exact_sums():
        head, tokens = head_of(problem), tokens_of(problem)
        tokens, num_active = _active_first(problem, tokens)
        one_chunk = num_active <= chunk_size(problem)
        total = Gradients(*inputs, needs, head.dtype, one_chunk=one_chunk)
        loss = torch.zeros((), dtype=head.dtype, device=problem.hidden.device)
        metrics: dict[str, Tensor] = {}
        parts: list[RowStats] = []
        active_rows = 0
        for index in _chunks_apart(problem, num_active, len(tokens.targets)):
            chunk = tokens.at(index)
            products, stats = head.forward(chunk)
            columns = [take(tensor, chunk.positions) for tensor in token_tensors]
            chunk_loss, chunk_metrics, coefs = _evaluate(
                loss_fn, stats, columns, any(needs) and index.start < num_active
            )
            loss += chunk_loss
            for name, value in chunk_metrics.items():
                metrics[name] = metrics[name] + value if name in metrics else value
            active_rows += _add_active(problem, head, chunk, products, stats, coefs, total)
            parts.append(stats)
        first, entropy, _, second = _outputs(problem, tokens, _join(parts, head, tokens))
    if any(needs):
        loss = _AttachGradients.apply(*inputs, loss, total)
    return TokenLossOutput(loss, metrics, first, entropy, second, problem.backend, active_rows)  # type: ignore[arg-type]


class _Logprob(torch.autograd.Function):
    """Forward keeps [N] statistics; backward recomputes the logits of the rows that need it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden.device.type, enabled=False), exact_sums():
            head, tokens = head_of(problem), tokens_of(problem)
            parts = []
            for index in slices(len(tokens.targets), forward_chunk_size(problem)):
                parts.append(head.forward(tokens.at(index))[1])
            stats = _join(parts, head, tokens)
        # The inputs go through save_for_backward alone, so that saved-tensor hooks and the check
        # against in-place changes see them.
        ctx.save_for_backward(hidden, weight, bias)
        nothing = hidden.new_empty(0)
        ctx.problem = replace(problem, hidden=nothing, weight=nothing, bias=None)
        ctx.tokens, ctx.stats = tokens, stats
        return _outputs(problem, tokens, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        problem = replace(ctx.problem, hidden=hidden, weight=weight, bias=bias)
        tokens: Tokens = ctx.tokens
        with torch.autocast(hidden.device.type, enabled=False), exact_sums():
            head = head_of(problem)
            kept = [None if grad is None else take(grad, tokens.positions) for grad in grads]
            coefs = RowCoefs(*kept)
            active = _active_rows(coefs, tokens)
            one_chunk = len(tokens.targets) <= chunk_size(problem)
            inputs = hidden, weight, bias
            needs = ctx.needs_input_grad[:3]
            total = Gradients(*inputs, needs, head.dtype, one_chunk=one_chunk)
            if active is not None:
                _recompute(
                    problem,
                    head,
                    tokens.at(active),
                    ctx.stats.select(active),
                    coefs.select(active),
                    total,
                )
            return *total.finish(), None


class _AttachGradients(torch.autograd.Function):
    """The loss, with gradients that are already known."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: Tensor,
        total: Gradients,
    ) -> Tensor:
        ctx.total = total
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.total is None:
            raise RuntimeError(
                "linear_token_loss: backward ran a second time, but its gradients were scaled in "
                "place by the first; call linear_token_loss again, or add losses before backward"
            )
        total, ctx.total = ctx.total, None
        return *total.finish(grad), None, None


def _evaluate(
    loss_fn: TokenLoss, stats: RowStats, slices: list[Tensor], wants_grad: bool
) -> tuple[Tensor, dict[str, Tensor], RowCoefs]:
    """Run the token loss on a chunk and differentiate it by what the rows gave it."""
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
        found[: len(used)] = torch.autograd.grad(loss, used, allow_unused=True)
    metrics = {name: value.detach() for name, value in metrics.items()}
    return loss.detach(), metrics, RowCoefs(found[0], found[1], None, found[2])


def _active_first(problem: Problem, tokens: Tokens) -> tuple[Tokens, int]:
    """Tokens in the order active, others, and the number of active ones."""
    if problem.active is None:
        return tokens, len(tokens.targets)
    others = torch.ones(len(problem.targets), dtype=torch.bool, device=tokens.targets.device)
    others[problem.active] = False
    num_active = len(problem.active)
    if isinstance(tokens.positions, Tensor):  # some are ignored, and finding them has waited
        others = others[tokens.positions]
        num_active = int((~others).sum())
    return tokens.at(others.to(torch.uint8).argsort(stable=True)), num_active


def _chunks_apart(problem: Problem, num_active: int, num_tokens: int) -> Iterator[slice]:
    """Chunks that hold either active tokens or others."""
    size = forward_chunk_size(problem)
    yield from slices(num_active, size)
    for index in slices(num_tokens - num_active, size):
        yield slice(index.start + num_active, index.stop + num_active)


def _add_active(
    problem: Problem,
    head: Head,
    tokens: Tokens,
    products: Tensor | None,
    stats: RowStats,
    coefs: RowCoefs,
    total: Gradients,
) -> int:
    """Add a chunk's gradients, of its active rows only; returns their number."""
    active = _active_rows(coefs, tokens)
    if active is None:
        return 0
    if isinstance(active, Tensor):
        products = None if products is None else products.index_select(0, active)
        tokens, stats, coefs = tokens.at(active), stats.select(active), coefs.select(active)
    if products is None:
        _recompute(problem, head, tokens, stats, coefs, total)
    else:
        head.add_gradients(tokens, products, stats, coefs, total)
    return len(tokens.targets)


def _recompute(
    problem: Problem,
    head: Head,
    tokens: Tokens,
    stats: RowStats,
    coefs: RowCoefs,
    total: Gradients,
) -> None:
    """Add the gradients of tokens whose logits are gone."""
    for index in slices(len(tokens.targets), chunk_size(problem)):
        chunk = tokens.at(index)
        products = head.products(chunk)
        # A fused forward rounds its logits differently, or not at all: with its normaliser, the
        # probabilities of these would not add up to one.
        part = head.stats(chunk, products) if head.fused else stats.select(index)
        head.add_gradients(chunk, products, part, coefs.select(index), total)


def _active_rows(coefs: RowCoefs, tokens: Tokens) -> Tensor | slice | None:
    """Rows with a coefficient that is not zero, or None if there are none.

    On CUDA that is every row: finding out would wait for the device, so there the caller says
    which tokens are active.
    """
    known = [coef for coef in coefs if coef is not None]
    if not known:
        return None
    if known[0].device.type != "cpu":
        return slice(None)
    active = torch.stack([coef != 0 for coef in known]).any(0).nonzero().squeeze(1)
    if not len(active):
        return None
    return slice(None) if len(active) == len(tokens.targets) else active


def _join(parts: list[RowStats], head: Head, tokens: Tokens) -> RowStats:
    if parts:
        columns = zip(*parts, strict=True)
        joined = [None if column[0] is None else torch.cat(column) for column in columns]
        return RowStats(*joined)  # type: ignore[arg-type]
    empty = torch.zeros(0, dtype=head.dtype, device=head.hidden.device)
    second = None if tokens.second_inv_temperature is None else empty
    return RowStats(empty, empty, empty, empty, second, second)


def _outputs(problem: Problem, tokens: Tokens, stats: RowStats) -> tuple[Tensor | None, ...]:
    lse = stats.max_logit * tokens.inv_temperature + stats.log_sum
    values = stats.logprob, stats.entropy, lse, stats.second_logprob
    return tuple(None if x is None else problem.spread(x, tokens.positions) for x in values)
