"""The pass that a plan has chosen: from row coefficients to the gradients of the inputs."""

from __future__ import annotations

from typing import Protocol

from aepo_kernels.head.accumulators import Gradients
from aepo_kernels.head.block_pass import BlockPass
from aepo_kernels.head.chunk_pass import ChunkPass
from aepo_kernels.head.plan import Plan, Strategy
from aepo_kernels.head.projection import Head
from aepo_kernels.head.slice_pass import SlicePass
from aepo_kernels.head.tokens import Tokens
from aepo_kernels.problem import Problem
from aepo_kernels.rows.interface import RowCoefs, RowStats


class GradientPass(Protocol):
    """Takes each chunk forward, then backward if the chunk has a gradient, and finishes at the end.

    `backward` of a chunk that never went forward makes its logits again.
    """

    total: Gradients

    def chunks(self, num_active: int, num_tokens: int) -> list[slice]: ...
    def forward(self, chunk: Tokens, keep: bool) -> RowStats: ...
    def backward(self, chunk: Tokens, stats: RowStats, coefs: RowCoefs) -> None: ...
    def finish(self) -> Gradients: ...


def pass_of(problem: Problem, plan: Plan, head: Head, needs: tuple[bool, ...]) -> GradientPass:
    """The plan's pass. needs: which of the problem's inputs need a gradient."""
    total = Gradients(problem, plan, needs)
    if plan.strategy is Strategy.SLICES:
        return SlicePass(plan, head, total)
    if plan.strategy is Strategy.BLOCKS:
        return BlockPass(plan, head, total)
    return ChunkPass(plan, head, total, problem.row_sampling)
