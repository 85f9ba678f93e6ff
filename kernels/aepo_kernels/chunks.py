"""Chunks of tokens and the head they go through: the three GEMMs and what happens between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aepo_kernels import rows
from aepo_kernels.gemm import matmul
from aepo_kernels.gradients import Gradients
from aepo_kernels.problem import Problem, take
from aepo_kernels.rows import LogitMap, RowCoefs, RowStats

# Bytes of a chunk's logits, and its most tokens. The size never depends on N, so that a token's
# results do not depend on its batch; larger chunks update the weight's fp32 gradient less often.
_CPU_CHUNK_BYTES, _CPU_CHUNK_TOKENS = 2**27, 1024
_GPU_CHUNK_BYTES, _GPU_CHUNK_TOKENS = 3 * 2**29, 8192


@dataclass(frozen=True)
class Tokens:
    """Some of the tokens that count: where they stand in the batch, targets, temperatures."""

    positions: Tensor | slice
    targets: Tensor  # [M]
    inv_temperature: float | Tensor  # float or [M]
    second_inv_temperature: float | Tensor | None

    def at(self, index: Tensor | slice) -> Tokens:
        """Some of these tokens."""
        positions = self.positions
        if isinstance(positions, Tensor):
            positions = positions[index]
        elif isinstance(index, Tensor):
            positions = index + (positions.start or 0)
        else:
            positions = index
        return Tokens(
            positions,
            self.targets[index],
            _pick(self.inv_temperature, index),
            _pick(self.second_inv_temperature, index),
        )


@dataclass(frozen=True)
class Head:
    """The head as GEMMs and rows read it: weight [V, H] in hidden's dtype, bias in `dtype`.

    logits_dtype: of the first GEMM's output.
    """

    hidden: Tensor
    weight: Tensor
    logit_map: LogitMap
    dtype: torch.dtype
    logits_dtype: torch.dtype

    def products(self, tokens: Tokens) -> Tensor:
        """GEMM 1: the raw logits of some tokens, [C, V]."""
        return matmul(take(self.hidden, tokens.positions), self.weight.T, self.logits_dtype)

    def stats(self, tokens: Tokens, products: Tensor) -> RowStats:
        """Statistics of a chunk's rows."""
        return rows.row_stats(
            products,
            tokens.targets,
            tokens.inv_temperature,
            tokens.second_inv_temperature,
            self.logit_map,
            self.dtype,
        )

    def add_gradients(
        self, tokens: Tokens, products: Tensor, stats: RowStats, coefs: RowCoefs, total: Gradients
    ) -> None:
        """GEMMs 2 and 3; `products` may be overwritten."""
        in_place = products.dtype == self.hidden.dtype
        dlogits = products if in_place else torch.empty_like(products, dtype=self.hidden.dtype)
        rows.row_grad(
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


def head_of(problem: Problem) -> Head:
    """The head of a problem, cast once."""
    hidden, dtype = problem.hidden.detach(), problem.stats_dtype
    bias = None if problem.bias is None else problem.bias.detach().to(dtype)
    return Head(
        hidden,
        problem.weight.detach().to(hidden.dtype),
        LogitMap(bias, problem.softcap, float(problem.logit_scale)),
        dtype,
        problem.logits_dtype or hidden.dtype,
    )


def tokens_of(problem: Problem) -> Tokens:
    """The tokens that are not ignored."""
    first, second = (
        _inverse(value, problem.stats_dtype)
        for value in (problem.temperature, problem.second_temperature)
    )
    assert first is not None
    everything = Tokens(slice(0, len(problem.targets)), problem.targets, first, second)
    kept = problem.kept()
    return everything if kept is None else everything.at(kept)


def chunk_size(problem: Problem) -> int:
    """Tokens of a chunk: the caller's, or what the memory budget holds."""
    if problem.chunk_tokens is not None:
        return problem.chunk_tokens
    hidden = problem.hidden
    width = hidden.element_size()
    budget, most = _CPU_CHUNK_BYTES, _CPU_CHUNK_TOKENS
    if hidden.device.type != "cpu":
        budget, most = _GPU_CHUNK_BYTES, _GPU_CHUNK_TOKENS
        if problem.logits_dtype not in (None, hidden.dtype):
            width += 4  # float32 logits stand beside their gradient in hidden's dtype
    size = budget // (problem.weight.shape[0] * width)
    return min(max(size // 64 * 64, 64), most)


def chunks_of(problem: Problem, num_tokens: int) -> Iterator[slice]:
    """Slices of at most `chunk_size` tokens."""
    size = chunk_size(problem)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def _inverse(value: float | Tensor | None, dtype: torch.dtype) -> float | Tensor | None:
    if isinstance(value, Tensor):
        return value.to(dtype).reciprocal()
    return None if value is None else 1.0 / value


def _pick(value: Any, index: Tensor | slice) -> Any:
    return value[index] if isinstance(value, Tensor) else value
