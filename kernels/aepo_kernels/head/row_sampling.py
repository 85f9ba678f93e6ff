"""Unbiased sampling of rows: fewer rows in the gradient GEMMs, at a variance that is reported."""

from __future__ import annotations

import torch
from torch import Tensor

from aepo_kernels.problem import RowSampling
from aepo_kernels.ranges import slices
from aepo_kernels.rows.interface import RowCoefs, RowStats

_NORM_ROWS = 16


def sample_rows(stats: RowStats, coefs: RowCoefs, how: RowSampling) -> tuple[RowCoefs, Tensor]:
    """Coefficients divided by their row's probability of being kept, 0 in the others; [C] of q."""
    size = torch.zeros_like(stats.logprob)
    if coefs.logprob is not None:
        size += coefs.logprob.abs() * -torch.expm1(stats.logprob)
    if coefs.second_logprob is not None and stats.second_logprob is not None:
        size += coefs.second_logprob.abs() * -torch.expm1(stats.second_logprob)
    if coefs.entropy is not None:
        size += coefs.entropy.abs() * stats.entropy.clamp(0, 1)
    # A row whose size rounds to nothing keeps a chance, and with it an unbiased gradient.
    keep_prob = (size / how.threshold).clamp(1e-3, 1)
    draw = torch.rand(size.shape, dtype=size.dtype, device=size.device, generator=how.generator)
    factor = (draw < keep_prob) / keep_prob
    return RowCoefs(*(None if coef is None else coef * factor for coef in coefs)), keep_prob


def variance_of(dlogits: Tensor, keep_prob: Tensor) -> Tensor:
    """Unbiased estimate of the variance that sampling adds to the kept rows' logit gradients.

    A row with gradient g, kept with probability q, adds |g|^2 (1/q - 1), of which a kept row
    estimates (1 - q) |g / q|^2; dlogits holds g / q.
    """
    # A CPU would make a wide copy of all that a norm is taken of.
    size = _NORM_ROWS if dlogits.device.type == "cpu" else len(dlogits)
    norms = [
        torch.linalg.vector_norm(dlogits[rows], dim=1, dtype=keep_prob.dtype)
        for rows in slices(len(dlogits), size)
    ]
    return ((1 - keep_prob) * torch.cat(norms).square()).sum()
