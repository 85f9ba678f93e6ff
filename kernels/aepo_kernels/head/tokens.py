"""Tokens that are not ignored: their positions in the batch, their targets and temperatures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aepo_kernels.head.sharding import local_targets
from aepo_kernels.problem import Problem
from aepo_kernels.ranges import join_positions, part_of


@dataclass(frozen=True)
class Tokens:
    """Some tokens of the batch that are not ignored, with inverse temperatures."""

    positions: Tensor | slice  # in the batch, [M]
    targets: Tensor  # [M]
    inv_temperature: float | Tensor  # float or [M]
    second_inv_temperature: float | Tensor | None

    def at(self, index: Tensor | slice) -> Tokens:
        """The tokens at an index of these."""
        return Tokens(
            part_of(self.positions, index),
            self.targets[index],
            _pick(self.inv_temperature, index),
            _pick(self.second_inv_temperature, index),
        )

    def within(self, rows: slice) -> Tokens:
        """The same tokens with targets of a slice of the vocabulary, -1 for those outside it."""
        inside = (self.targets >= rows.start) & (self.targets < rows.stop)
        return replace(self, targets=torch.where(inside, self.targets - rows.start, -1))


def join_tokens(parts: Sequence[Tokens]) -> Tokens:
    """Several sets of tokens as one, in order."""
    if len(parts) == 1:
        return parts[0]
    return Tokens(
        join_positions([part.positions for part in parts], parts[0].targets.device),
        torch.cat([part.targets for part in parts]),
        _cat([part.inv_temperature for part in parts]),
        _cat([part.second_inv_temperature for part in parts]),
    )


def tokens_of(problem: Problem) -> Tokens:
    """The tokens that are not ignored."""
    first, second = (
        _inverse(value, problem.stats_dtype)
        for value in (problem.temperature, problem.second_temperature)
    )
    assert first is not None
    targets = problem.targets
    if problem.shard is not None:
        targets = local_targets(targets, problem.shard, problem.weight.shape[0])
    everything = Tokens(slice(0, len(targets)), targets, first, second)
    kept = problem.kept()
    return everything if kept is None else everything.at(kept)


def _inverse(value: float | Tensor | None, dtype: torch.dtype) -> float | Tensor | None:
    if isinstance(value, Tensor):
        return value.to(dtype).reciprocal()
    return None if value is None else 1.0 / float(value)  # Triton takes no number of numpy's


def _cat(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else values[0]


def _pick(value: Any, index: Tensor | slice) -> Any:
    return value[index] if isinstance(value, Tensor) else value
