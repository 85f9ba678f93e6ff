"""`linear_token_loss` where no graph can be broken: the operator of log-probs, then the loss.

The loss becomes a part of the graph, and its gradient goes through that of `linear_logprob`, which
makes the logits again: four GEMMs instead of three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aepo_kernels.problem import LogprobOutput, TokenLoss, TokenLossOutput, sum_losses


def traced_token_loss(
    linear_logprob: Callable[..., LogprobOutput],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    *token_tensors: Tensor,
    ignore_index: int | None = -100,
    active: Tensor | None = None,
    check_loss: bool = True,
    shard: Any = None,
    weight_grad: Tensor | None = None,
    weight_slice: int | None = None,
    row_sampling: Any = None,
    kept_ids: Tensor | None = None,
    **options: Any,
) -> TokenLossOutput:
    """`linear_token_loss` of all tokens at once, as a graph holds it.

    The loss is not checked, so `check_loss` changes nothing. Raises ValueError for what depends on
    numbers: ignored tokens, and the arguments that change how gradients are added up.
    """
    for name, value in (
        ("shard", shard),
        ("weight_grad", weight_grad),
        ("weight_slice", weight_slice),
        ("row_sampling", row_sampling),
        ("kept_ids", kept_ids),
    ):
        if value is not None:
            _refuse(f"with {name}", "call it outside of torch.export, make_fx and fullgraph=True")
    if ignore_index is not None:
        _refuse("with ignore_index", "select the tokens before, and pass ignore_index=None")
    for index, tensor in enumerate(token_tensors):
        if tensor.requires_grad:
            raise ValueError(
                f"token_tensors[{index}] = requires_grad: it would get no gradient; "
                "pass tensor.detach()"
            )
    # The loss may take the gradient of each: see `head.plan.direction_of`.
    names = ["logprob", "entropy"]
    if options.get("second_temperature") is not None:
        names.append("second_logprob")
    given = hidden, weight, targets
    rows = linear_logprob(*given, ignore_index=None, grad_of=names, **options)
    values = rows.logprob, rows.entropy, rows.second_logprob  # [N]
    if active is not None:
        inside = torch.zeros_like(targets, dtype=torch.bool).index_fill(0, active, True)
        values = tuple(None if x is None else x.where(inside, x.detach()) for x in values)
    with torch.autocast(hidden.device.type, enabled=False):
        loss, metrics = sum_losses(token_loss(*values, *token_tensors))
    num_active = len(targets) if active is None else len(active)
    return TokenLossOutput(
        loss,
        {name: value.detach() for name, value in metrics.items()},
        rows.logprob.detach(),
        rows.entropy.detach(),
        None if rows.second_logprob is None else rows.second_logprob.detach(),
        rows.backend,
        rows.row_kernels,
        num_active if loss.requires_grad else 0,
    )


def _refuse(what: str, fix: str) -> None:
    raise ValueError(
        f"linear_token_loss: its work depends on numbers, so it cannot be traced {what}; {fix}"
    )
