"""Parts of a batch: positions of tokens, and slices of at most so many items."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def take(values: Tensor, positions: Tensor | slice | None) -> Tensor:
    """Rows of `values`, [N, ...], at some positions, [M]; None takes all rows."""
    if isinstance(positions, Tensor):
        return values.index_select(0, positions)
    return values if positions is None else values[positions]


def slices(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` items that together cover `count` items."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def slices_of_runs(runs: Sequence[tuple[int, int]]) -> Iterator[slice]:
    """Slices that cover one run of items after the other, from 0 on. runs: (count, size) each."""
    start = 0
    for count, size in runs:
        for index in slices(count, max(size, 1)):
            yield slice(start + index.start, start + index.stop)
        start += count


def part_of(positions: Tensor | slice, index: Tensor | slice) -> Tensor | slice:
    """The positions at an index of `positions`; a slice of a slice stays a slice."""
    if isinstance(positions, Tensor):
        return positions[index]
    if isinstance(index, Tensor):
        return index + positions.start
    part = range(positions.start, positions.stop)[index]
    return slice(part.start, part.stop)


def join_positions(parts: list[Tensor | slice], device: torch.device) -> Tensor | slice:
    """Several sets of positions as one; slices that follow each other stay a slice."""
    spans = [part for part in parts if isinstance(part, slice)]
    if len(spans) == len(parts) and all(a.stop == b.start for a, b in pairwise(spans)):
        return slice(spans[0].start, spans[-1].stop)  # which takes rows without a copy
    wanted = [
        part if isinstance(part, Tensor) else torch.arange(part.start, part.stop, device=device)
        for part in parts
    ]
    return torch.cat(wanted)
