"""The correctness gate of training steps: errors against a float32 step without autocast.

The loss before the first update hardly depends on the model, whose ratio to itself is 1; so the
log-probs, the entropy and the gradient are compared besides the loss and the gradients' norms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aepo_fast.method.metric_sums import MetricSum
from aepo_fast.training.update import UpdateResult
from bench.common.timing import describe_error, release
from bench.step.candidates import Candidate, Problem, reference_step

# A candidate is incorrect if a relative error is more than this many times that of materialised
# logits under bfloat16 autocast, plus what rounding once to bfloat16 can do.
LIMIT, EPSILON = 2.0, 2.0**-8

Values = dict[str, list[Tensor]]


def gated(
    problem: Problem, candidates: Sequence[Candidate]
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """The errors of materialised logits in the compute dtype, and each candidate's record."""
    exact, _ = observe(problem, functools.partial(reference_step, problem, torch.float32))
    plain = functools.partial(reference_step, problem, problem.plain.machine.compute_dtype)
    reference = errors_of(observe(problem, plain)[0], exact)
    found = {one.name: check(problem, one, exact, reference) for one in candidates}
    return reference, found


def gated_adapter(
    exact: Problem, problem: Problem, candidate: Candidate
) -> tuple[dict[str, float], dict[str, Any]]:
    """As `gated` for one candidate over a problem with an adapter on weights of bfloat16.

    exact: the same problem with weights of float32.
    """
    truth, _ = observe(exact, functools.partial(reference_step, exact, torch.float32))
    plain = functools.partial(reference_step, problem, problem.plain.machine.compute_dtype)
    reference = errors_of(observe(problem, plain)[0], truth)
    return reference, check(problem, candidate, truth, reference)


def check(
    problem: Problem, candidate: Candidate, exact: Values, reference: dict[str, float]
) -> dict[str, Any]:
    """The gate's part of a candidate's record: status, message, errors and model tokens."""
    if candidate.unavailable_reason is not None:
        return {"status": "not available", "message": candidate.unavailable_reason}
    try:
        values, result = observe(problem, candidate.step)
    # Whatever another project's kernel raises is that candidate's result.
    except Exception as error:
        problem.optimizer.zero_grad(set_to_none=True)
        release(problem.ours.device)
        return {"status": "failed", "message": describe_error(error)}
    errors = errors_of(values, exact)
    wrong = [
        f"{name}: relative error {error:.2g}, allowed {LIMIT * reference[name] + EPSILON:.2g}"
        for name, error in errors.items()
        # Not "error > allowed": a comparison with nan must not pass.
        if not error <= LIMIT * reference[name] + EPSILON
    ]
    return {
        "status": "incorrect" if wrong else "ok",
        "message": "; ".join(wrong),
        "errors": errors,
        "model_tokens": result.model_tokens,
        "layout": candidate.policy.layout,
        "attention": candidate.policy.model.config._attn_implementation,
    }


def observe(problem: Problem, step: Callable[[], UpdateResult]) -> tuple[Values, UpdateResult]:
    """A step's loss, gradient norms, entropy, log-probs and clipped gradient, and what it returned.

    Raises FloatingPointError where the loss or the gradient is not finite.
    """
    gradient: list[Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            gradient.extend(weight.grad.clone() for weight in group["params"])

    handle = problem.optimizer.register_step_pre_hook(keep)
    try:
        result = step()
    finally:
        handle.remove()
    if not result.taken:
        raise FloatingPointError(f"loss {result.loss}, gradient norm {result.grad_norm}")
    # Of each weight, before the clip. The norm of all of them is one number, whose error with
    # materialised logits may be near zero by chance, which would allow none.
    norms = torch.stack([one.norm() for one in gradient])
    values = {
        "loss": [torch.tensor(result.loss)],
        "grad_norm": [norms * (result.grad_norm / norms.norm())],
        "entropy": [torch.tensor(result.sums[MetricSum.ENTROPY])],
        "logprob": [result.logprob],
        "gradient": gradient,
    }
    return values, result


def errors_of(values: Values, exact: Values) -> dict[str, float]:
    """Euclidean norm of each value's difference from the truth, over that of the truth."""

    def norm(tensors: Sequence[Tensor]) -> float:
        return torch.stack([one.float().norm() for one in tensors]).norm().item()

    return {
        name: norm([got - want for got, want in zip(values[name], wanted, strict=True)])
        / norm(wanted)
        for name, wanted in exact.items()
    }
