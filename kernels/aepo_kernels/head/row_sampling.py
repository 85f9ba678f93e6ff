"""Which rows take part in the gradient GEMMs: those with a coefficient, or an unbiased sample."""

from __future__ import annotations

import torch
from torch import Tensor

from aepo_kernels.problem import RowSampling
from aepo_kernels.ranges import slices
from aepo_kernels.rows.interface import RowCoefs, RowStats

# Rows whose norm a CPU computes at a time: torch makes a float32 copy of those rows. Not measured.
_NORM_ROWS = 16


def rows_with_gradient(coefs: RowCoefs, *, look: bool) -> Tensor | slice | None:
    """Rows with a coefficient that is not zero, [A] or all; None if there are none.

    look: False takes every row. On a GPU a look at the coefficients would wait for the device, so
    the caller says there which tokens are active.
    """
    known = [coef for coef in coefs if coef is not None]
    if not known or not len(known[0]):
        return None
    if not look:
        return slice(None)
    active = torch.stack([coef != 0 for coef in known]).any(0).nonzero().squeeze(1)
    if not len(active):
        return None
    return slice(None) if len(active) == len(known[0]) else active


def sample_rows(stats: RowStats, coefs: RowCoefs, how: RowSampling) -> tuple[RowCoefs, Tensor]:
    """Coefficients divided by their row's probability of being kept, 0 in the others; [C] of q."""
    size = torch.zeros_like(stats.logprob)
    if coefs.logprob is not None:
        size += coefs.logprob.abs() * -torch.expm1(stats.logprob)
    if coefs.second_logprob is not None and stats.second_logprob is not None:
        size += coefs.second_logprob.abs() * -torch.expm1(stats.second_logprob)
    if coefs.entropy is not None:
        size += coefs.entropy.abs() * stats.entropy.clamp(0, 1)
    # Even a row whose size rounds to 0 must have a chance, or its gradient would be biased.
    keep_prob = (size / how.threshold).clamp(1e-3, 1)
    draw = torch.rand(size.shape, dtype=size.dtype, device=size.device, generator=how.generator)
    factor = (draw < keep_prob) / keep_prob
    return RowCoefs(*(None if coef is None else coef * factor for coef in coefs)), keep_prob


def variance_of(dlogits: Tensor, keep_prob: Tensor, *, few: bool) -> Tensor:
    """Unbiased estimate of the variance that sampling adds to the kept rows' logit gradients.

    A row with gradient g that is kept with probability q adds |g|^2 (1/q - 1) to the variance. A
    kept row's estimate of it is (1 - q) |g / q|^2. dlogits: g / q, [A, V]. keep_prob: q, [A]. few:
    take a few rows at a time, which a CPU needs.
    """
    size = _NORM_ROWS if few else len(dlogits)
    norms = [
        torch.linalg.vector_norm(dlogits[rows], dim=1, dtype=keep_prob.dtype)
        for rows in slices(len(dlogits), size)
    ]
    return ((1 - keep_prob) * torch.cat(norms).square()).sum()
