"""Rows that a pass keeps until all rows are in: gradients follow by slices of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aepo_kernels.head.stashed_logits import StashedLogits
from aepo_kernels.head.tokens import Tokens, join_tokens
from aepo_kernels.rows.interface import RowCoefs, RowStats


@dataclass(frozen=True)
class Part:
    """Some rows, [C], with their raw logits [C, V] where these still exist."""

    tokens: Tokens
    stats: RowStats
    coefs: RowCoefs
    logits: Tensor | StashedLogits | None = None


def join_parts(parts: list[Part]) -> Part:
    """Several parts as one without logits; a single part as it is."""
    if len(parts) == 1:
        return parts[0]
    num_rows = [len(part.tokens.targets) for part in parts]
    stats = [_cat(column, num_rows) for column in zip(*(part.stats for part in parts), strict=True)]
    coefs = [_cat(column, num_rows) for column in zip(*(part.coefs for part in parts), strict=True)]
    tokens = join_tokens([part.tokens for part in parts])
    return Part(tokens, RowStats(*stats), RowCoefs(*coefs))  # type: ignore[arg-type]


def _cat(column: Sequence[Tensor | None], num_rows: list[int]) -> Tensor | None:
    """One column of several parts; a part without it has zeros."""
    known = [x for x in column if x is not None]
    if not known:
        return None
    return torch.cat(
        [known[0].new_zeros(n) if x is None else x for x, n in zip(column, num_rows, strict=True)]
    )
