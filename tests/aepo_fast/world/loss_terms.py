"""How large the terms of a loss are, which say what rounding of their sum may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from aepo_fast.method.objective import Objective
from aepo_fast.training import trainer

# A loss is linear in them, each a number a token.
_WEIGHTS = ("weight", "aux_weight")


@contextmanager
def measured_terms() -> Iterator[list[tuple[float, float]]]:
    """While it is open, one process notes the sum of the terms' magnitudes of each update.

    The term of a token is its weight times the loss's derivative by that weight. Beside it stands
    the sum of what nearly cancels in terms: the two log-probs of AEPO's form `expected`.
    """
    found: list[tuple[float, float]] = []
    plain = trainer.build_objective

    def build(*args: Any, **options: Any) -> Objective:
        objective, number = plain(*args, **options), len(found)
        found.append((0.0, 0.0))

        def noting(loss: Callable[..., Any]) -> Callable[..., Any]:
            def run(*given: Any) -> Any:
                *values, columns = (_without_graph(one) for one in given)
                weights = [columns[name].requires_grad_() for name in _WEIGHTS]
                second = values[2]
                parts = weights if second is None else [*weights, second.requires_grad_()]
                with torch.enable_grad():
                    total = loss(*values, columns)[0]
                    slopes = torch.autograd.grad(
                        total, parts, allow_unused=True, materialize_grads=True
                    )
                terms = [(x * slope).detach() for x, slope in zip(parts, slopes, strict=True)]
                ours = terms[: len(weights)]
                torch.testing.assert_close(sum(one.sum() for one in ours), total.detach())
                size, all_sizes = (sum(x.abs().sum().item() for x in xs) for xs in (ours, terms))
                # The first log-prob's part is as large as that of the second.
                before, beside = found[number]
                found[number] = before + size, beside + 2 * (all_sizes - size)
                return loss(*given)

            return run

        whole = objective.sequence_loss
        return replace(
            objective,
            token_loss=noting(objective.token_loss),
            sequence_loss=None if whole is None else noting(whole),
        )

    trainer.build_objective = build
    try:
        yield found
    finally:
        trainer.build_objective = plain


def _without_graph(value: Any) -> Any:
    """The same values; columns are copied, so that they can get a graph of their own."""
    if isinstance(value, dict):
        return {name: _without_graph(one).clone() for name, one in value.items()}
    return value.detach() if isinstance(value, torch.Tensor) else value
