"""The chunked backend: logits of a few tokens at a time, so that [N, V] never exists.

Per chunk: one GEMM for the logits, fused row statistics, and, where gradients are wanted, the
logits' gradient in place and two more GEMMs. `linear_token_loss` knows the loss's derivatives
within the chunk (3 GEMMs); `linear_logprob` learns them in backward and recomputes (4 GEMMs).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aepo_kernels import rows as row_ops
from aepo_kernels.gemm import matmul
from aepo_kernels.gradients import Gradients
from aepo_kernels.problem import (
    LogprobOutput,
    Problem,
    TokenLoss,
    TokenLossOutput,
    sum_losses,
    take,
)
from aepo_kernels.rows import LogitMap, RowCoefs, RowStats

NAME = "chunked"
# Bytes of a chunk's logits, and its most tokens. The size never depends on N, so that a token's
# results do not depend on its batch; larger chunks update the weight's fp32 gradient less often.
_CPU_CHUNK_BYTES, _CPU_CHUNK_TOKENS = 2**27, 1024
_GPU_CHUNK_BYTES, _GPU_CHUNK_TOKENS = 2**31, 8192


@dataclass(frozen=True)
class _Tokens:
    """Some of the tokens that count: where they stand in the batch, targets, temperatures."""

    positions: Tensor | slice
    targets: Tensor  # [M]
    inv_temperature: float | Tensor  # float or [M]
    second_inv_temperature: float | Tensor | None

    def at(self, index: Tensor | slice) -> _Tokens:
        positions = self.positions
        if isinstance(positions, Tensor):
            positions = positions[index]
        elif isinstance(index, Tensor):
            positions = index + (positions.start or 0)
        else:
            positions = index
        return _Tokens(
            positions,
            self.targets[index],
            _pick(self.inv_temperature, index),
            _pick(self.second_inv_temperature, index),
        )


@dataclass(frozen=True)
class _Head:
    """The head as GEMMs and rows read it: weight [V, H] in hidden's dtype, bias in `dtype`."""

    hidden: Tensor
    weight: Tensor
    logit_map: LogitMap
    dtype: torch.dtype

    def products(self, tokens: _Tokens) -> Tensor:
        """GEMM 1: the raw logits of some tokens, [C, V]."""
        return matmul(take(self.hidden, tokens.positions), self.weight.T)

    def stats(self, tokens: _Tokens, products: Tensor) -> RowStats:
        return row_ops.row_stats(
            products,
            tokens.targets,
            tokens.inv_temperature,
            tokens.second_inv_temperature,
            self.logit_map,
            self.dtype,
        )

    def add_gradients(
        self, tokens: _Tokens, products: Tensor, stats: RowStats, coefs: RowCoefs, total: Gradients
    ) -> None:
        """GEMMs 2 and 3; `products` may be overwritten."""
        in_place = products.dtype == self.hidden.dtype
        dlogits = products if in_place else torch.empty_like(products, dtype=self.hidden.dtype)
        row_ops.row_grad(
            products,
            tokens.targets,
            tokens.inv_temperature,
            tokens.second_inv_temperature,
            self.logit_map,
            stats,
            coefs,
            out=dlogits,
            bias_grad=total.bias,
        )
        total.add(dlogits, self.weight, take(self.hidden, tokens.positions), tokens.positions)


def logprob(problem: Problem) -> LogprobOutput:
    """`linear_logprob`, recomputing logits in backward."""
    rows = _Logprob.apply(problem.hidden, problem.weight, problem.bias, problem)
    return LogprobOutput(*rows, NAME)  # type: ignore[misc]


def token_loss(
    problem: Problem, loss_fn: TokenLoss, token_tensors: tuple[Tensor, ...]
) -> TokenLossOutput:
    """`linear_token_loss`, with gradients computed here and only scaled in backward."""
    inputs = problem.hidden, problem.weight, problem.bias
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    with torch.no_grad(), torch.autocast(problem.hidden.device.type, enabled=False):
        head, tokens = _head(problem), _tokens(problem)
        total = Gradients(*inputs, needs, head.dtype)
        loss = torch.zeros((), dtype=head.dtype, device=problem.hidden.device)
        metrics: dict[str, Tensor] = {}
        parts: list[RowStats] = []
        active_rows = 0
        for index in _chunks(problem, len(tokens.targets)):
            chunk = tokens.at(index)
            products = head.products(chunk)
            stats = head.stats(chunk, products)
            slices = [take(tensor, chunk.positions) for tensor in token_tensors]
            chunk_loss, chunk_metrics, coefs = _evaluate(loss_fn, stats, slices, any(needs))
            loss += chunk_loss
            for name, value in chunk_metrics.items():
                metrics[name] = metrics[name] + value if name in metrics else value
            active_rows += _add_active(head, chunk, products, stats, coefs, total)
            parts.append(stats)
        first, entropy, _, second = _outputs(problem, tokens, _join(parts, head, tokens))
    if any(needs):
        loss = _AttachGradients.apply(*inputs, loss, total)
    return TokenLossOutput(loss, metrics, first, entropy, second, NAME, active_rows)  # type: ignore[arg-type]


class _Logprob(torch.autograd.Function):
    """Forward keeps [N] statistics; backward recomputes the logits of the rows that need it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden.device.type, enabled=False):
            head, tokens = _head(problem), _tokens(problem)
            parts = []
            for index in _chunks(problem, len(tokens.targets)):
                chunk = tokens.at(index)
                parts.append(head.stats(chunk, head.products(chunk)))
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
        tokens: _Tokens = ctx.tokens
        with torch.autocast(hidden.device.type, enabled=False):
            head = _head(problem)
            total = Gradients(hidden, weight, bias, ctx.needs_input_grad[:3], head.dtype)
            kept = [None if grad is None else take(grad, tokens.positions) for grad in grads]
            coefs = RowCoefs(*kept)
            active = _active_rows(coefs)
            if active is not None:
                tokens, coefs = tokens.at(active), coefs.select(active)
                stats = ctx.stats.select(active)
                for index in _chunks(problem, len(active)):
                    chunk = tokens.at(index)
                    head.add_gradients(
                        chunk,
                        head.products(chunk),
                        stats.select(index),
                        coefs.select(index),
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
        return loss, metrics, RowCoefs(None, None, None, None)
    leaves = [None if x is None else x.detach().requires_grad_() for x in values]
    with torch.enable_grad():
        loss, metrics = sum_losses(loss_fn(*leaves, *slices))
    used = [leaf for leaf in leaves if leaf is not None]
    found: list[Tensor | None] = [None, None, None]
    if loss.requires_grad:
        found[: len(used)] = torch.autograd.grad(loss, used, allow_unused=True)
    metrics = {name: value.detach() for name, value in metrics.items()}
    return loss.detach(), metrics, RowCoefs(found[0], found[1], None, found[2])


def _add_active(
    head: _Head,
    tokens: _Tokens,
    products: Tensor,
    stats: RowStats,
    coefs: RowCoefs,
    total: Gradients,
) -> int:
    """Add a chunk's gradients, of its active rows only; returns their number."""
    active = _active_rows(coefs)
    if active is None or not len(active):
        return 0
    if len(active) < len(products):
        products = products.index_select(0, active)
        tokens, stats, coefs = tokens.at(active), stats.select(active), coefs.select(active)
    head.add_gradients(tokens, products, stats, coefs, total)
    return len(active)


def _active_rows(coefs: RowCoefs) -> Tensor | None:
    """Rows with a coefficient that is not zero, [A], or None if there are no coefficients."""
    known = [coef != 0 for coef in coefs if coef is not None]
    if not known:
        return None
    # Sizing the gradient GEMMs to these rows waits for the device on CUDA, once a chunk.
    return torch.stack(known).any(0).nonzero().squeeze(1)


def _head(problem: Problem) -> _Head:
    hidden, dtype = problem.hidden.detach(), problem.stats_dtype
    bias = None if problem.bias is None else problem.bias.detach().to(dtype)
    logit_map = LogitMap(bias, problem.softcap, float(problem.logit_scale))
    return _Head(hidden, problem.weight.detach().to(hidden.dtype), logit_map, dtype)


def _tokens(problem: Problem) -> _Tokens:
    dtype = problem.stats_dtype
    inverses = [
        value.to(dtype).reciprocal()
        if isinstance(value, Tensor)
        else None
        if value is None
        else 1.0 / value
        for value in (problem.temperature, problem.second_temperature)
    ]
    first, second = inverses
    assert first is not None
    everything = _Tokens(slice(0, len(problem.targets)), problem.targets, first, second)
    kept = problem.kept()
    return everything if kept is None else everything.at(kept)


def _chunks(problem: Problem, num_tokens: int) -> Iterator[slice]:
    size = problem.chunk_tokens
    if size is None:
        hidden = problem.hidden
        if hidden.device.type == "cpu":
            budget, most, width = _CPU_CHUNK_BYTES, _CPU_CHUNK_TOKENS, hidden.element_size()
        else:
            # float32 logits stand beside their gradient in hidden's dtype.
            budget, most, width = _GPU_CHUNK_BYTES, _GPU_CHUNK_TOKENS, 4 + hidden.element_size()
        size = budget // (problem.weight.shape[0] * width)
        size = min(max(size // 64 * 64, 64), most)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def _join(parts: list[RowStats], head: _Head, tokens: _Tokens) -> RowStats:
    if parts:
        columns = zip(*parts, strict=True)
        joined = [None if column[0] is None else torch.cat(column) for column in columns]
        return RowStats(*joined)  # type: ignore[arg-type]
    empty = torch.zeros(0, dtype=head.dtype, device=head.hidden.device)
    second = None if tokens.second_inv_temperature is None else empty
    return RowStats(empty, empty, empty, empty, second, second)


def _outputs(problem: Problem, tokens: _Tokens, stats: RowStats) -> tuple[Tensor | None, ...]:
    lse = stats.max_logit * tokens.inv_temperature + stats.log_sum
    values = stats.logprob, stats.entropy, lse, stats.second_logprob
    return tuple(None if x is None else problem.spread(x, tokens.positions) for x in values)


def _pick(value: Any, index: Tensor | slice) -> Any:
    return value[index] if isinstance(value, Tensor) else value
