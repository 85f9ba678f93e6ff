"""Bytes of the head in a pass over a micro-batch, by the rules of its own plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aepo_fast.config.resolve import Machine
from aepo_kernels.head.budget import DEFAULT_BUDGET
from aepo_kernels.head.plan import Plan, Strategy, make_plan
from aepo_kernels.problem import Problem

_FUSED_TOKEN = 20 * 2**10  # bytes a token of the fused forward pass, see head.plan.Budget


@dataclass(frozen=True)
class HeadBytes:
    """Bytes of the head beside its weight.

    cast: the weight in the compute dtype. work: logits and what else one call makes and frees.
    sums: gradients while they are added up. result: what the weight's gradient takes more while it
    becomes the weight's dtype. weight_grad: that gradient. score: the most of a call without one.
    """

    cast: int
    work: int
    sums: int
    result: int
    weight_grad: int
    score: int

    @property
    def peak(self) -> int:
        """The most of a call with gradients."""
        return self.cast + self.sums + self.work


def head_bytes(
    machine: Machine,
    weight: torch.Tensor,
    tokens: int,
    *,
    trained: bool,
    logit_grads: bool = True,
    kept: int = 0,
) -> HeadBytes:
    """Bytes of `linear_token_loss` over so many tokens.

    weight: [V, H], fake. trained: the weight needs a gradient. logit_grads: whether the hidden
    states do. kept: ids of each token that the sampler has kept at most; 0: all count.
    """
    if kept and machine.head_backend != "reference":
        return _kept_bytes(machine, weight, tokens, kept, trained=trained, logit_grads=logit_grads)
    # On a GPU no rule asks for more of the device than that it is not the CPU.
    device = "meta" if machine.is_gpu else "cpu"
    vocab, width = weight.shape
    hidden = torch.empty(tokens, width, dtype=machine.compute_dtype, device=device)
    problem = Problem(
        hidden,
        torch.empty(vocab, width, dtype=weight.dtype, device=device),
        torch.empty(tokens, dtype=torch.long, device=device),
        backend="chunked"
        if machine.head_backend in ("auto", "reference")
        else machine.head_backend,
    )
    plan = make_plan(problem, needs_weight=trained, rows=tokens)
    own, wide = hidden.dtype.itemsize, plan.stats_dtype.itemsize
    cast = 0 if weight.dtype == hidden.dtype else vocab * width * own
    logits, final = vocab * plan.logits_dtype.itemsize, vocab * width * weight.element_size()
    if machine.head_backend == "reference":  # autograd over whole logits in float32
        whole = tokens * vocab * (own + 4 * wide)
        return HeadBytes(
            cast=cast,
            work=whole,
            sums=final * trained,
            result=0,
            weight_grad=final * trained,
            score=tokens * vocab * 2 * wide,
        )
    stats = _stats(plan, tokens, vocab, logits)
    once = plan.written_once and weight.dtype == hidden.dtype
    sum_width = own if once else wide
    sums = tokens * width * own * logit_grads + vocab * width * sum_width * trained
    result = final if sum_width != weight.element_size() else 0
    return HeadBytes(
        cast=cast,
        work=_work(plan, tokens, vocab, width, own, stats),
        sums=sums,
        result=result * trained,
        weight_grad=final * trained,
        score=cast + stats,
    )


def _kept_bytes(
    machine: Machine,
    weight: torch.Tensor,
    tokens: int,
    kept: int,
    *,
    trained: bool,
    logit_grads: bool,
) -> HeadBytes:
    """The same where only kept ids count: `aepo_kernels.head.kept_ids`, in float32."""
    vocab, width = weight.shape
    budget = DEFAULT_BUDGET.gpu_kept_bytes if machine.is_gpu else DEFAULT_BUDGET.kept_bytes
    # The budget is for three float32 copies of the gathered rows. A CPU makes one, and one in
    # their own dtype.
    copies = 3 if machine.is_gpu else 1 if weight.dtype == torch.float32 else 1.5
    gathered = min(budget / 3, tokens * kept * width * 4) * copies
    work = round(gathered) + tokens * kept * 8  # ids are int64
    final = weight.numel() * weight.element_size() * trained
    own = tokens * width * machine.compute_dtype.itemsize * logit_grads
    sums = own + vocab * width * 4 * trained
    result = 0 if weight.dtype == torch.float32 else final
    return HeadBytes(cast=0, work=work, sums=sums, result=result, weight_grad=final, score=work)


def _stats(plan: Plan, tokens: int, vocab: int, logits: int) -> int:
    """The workspace of a call that makes statistics alone."""
    count = min(plan.stats_tokens, tokens)
    if plan.fused:
        return count * _FUSED_TOKEN
    if not plan.sliced_stats or not plan.reuses_memory:
        return count * logits
    columns = min(plan.stats_columns, vocab)
    return count * columns * plan.logits_dtype.itemsize


def _work(plan: Plan, tokens: int, vocab: int, width: int, own: int, stats: int) -> int:
    """Logits and their gradient, by the pass that the plan has chosen."""
    logits, wide = plan.logits_dtype.itemsize, plan.stats_dtype.itemsize
    copies = own if plan.column_major else 0  # of the logits' gradient, row-major
    if plan.strategy is Strategy.CHUNKS:
        count = min(plan.gradient_tokens, tokens)
        beside = own if not plan.reuses_memory and logits != own else 0
        blocks = 0 if plan.gemms.writes_float32 or plan.written_once else 2 * plan.gemms.block_bytes
        return count * vocab * (logits + beside + copies) + blocks * plan.reuses_memory
    rows = min(plan.slice_rows, vocab)
    hidden_sum = tokens * width * wide if own != wide else 0
    if plan.strategy is Strategy.BLOCKS:
        # Its workspaces are bounded, whatever the sizes are.
        budget = plan.budget
        blocks = budget.block_logits_bytes + budget.block_hidden_bytes + budget.block_weight_bytes
        return max(stats, blocks + min(hidden_sum, budget.block_sum_bytes))
    stashed = 0
    if plan.stash is not None:
        held = width * own // plan.stash.dtype.itemsize + plan.stash.beside
        stashed = min(tokens, held)
    kept = min(plan.gradient_tokens, tokens - stashed) if plan.keeps_last else 0
    beside = 0 if plan.stash is None else vocab * plan.stash.beside * plan.stash.dtype.itemsize
    slices = tokens * rows * (logits + copies)
    return kept * vocab * logits + beside + max(stats, slices) + hidden_sum
