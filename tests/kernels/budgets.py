"""The two functions within a `Budget`, which they have no argument for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from aepo_kernels import LogprobOutput, TokenLossOutput, reference, resolve_backend
from aepo_kernels.checks import check_active, check_problem, check_row_sampling
from aepo_kernels.head import kept_ids, logprob, token_loss
from aepo_kernels.head.budget import Budget
from aepo_kernels.problem import Problem


def logprob_within(
    budget: Budget, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> LogprobOutput:
    """`linear_logprob` within a budget."""
    problem = _problem(hidden, weight, targets, **options)
    if problem.features.autograd:
        return reference.logprob(problem)
    run = logprob.logprob if problem.kept_ids is None else kept_ids.logprob
    return run(problem, budget)


def token_loss_within(
    budget: Budget,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: Any,
    *tensors: Tensor,
    **options: Any,
) -> TokenLossOutput:
    """`linear_token_loss` within a budget."""
    problem = _problem(hidden, weight, targets, **options)
    if problem.features.autograd:
        return reference.token_loss(problem, loss, tensors)
    run = token_loss.token_loss if problem.kept_ids is None else kept_ids.token_loss
    return run(problem, loss, tensors, budget)


def _problem(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, backend: str = "auto", **options: Any
) -> Problem:
    name = resolve_backend(backend, hidden.device.type, hidden.dtype)
    problem = Problem(hidden, weight, targets, backend=name, **options)
    check_problem(problem)
    check_active(problem)
    check_row_sampling(problem)
    return problem
