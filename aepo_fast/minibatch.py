"""Splits a step's rows into minibatches and over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def plan_minibatches(
    main_groups: Sequence[Sequence[int]],
    positives: Sequence[int],
    *,
    num_minibatches: int,
    num_ranks: int = 1,
    rng: np.random.Generator,
) -> list[list[list[int]]]:
    """Row indices per minibatch and rank: plan[minibatch][rank].

    main_groups: rows of each prompt; groups are shuffled and kept whole, their numbers differ by
    at most one over all cells. positives: auxiliary rows with a gradient, spread the same way, so
    that AEPO's share is the same in every minibatch whatever the number of ranks.
    """
    plan: list[list[list[int]]] = [[[] for _ in range(num_ranks)] for _ in range(num_minibatches)]
    cells = [plan[m][r] for r in range(num_ranks) for m in range(num_minibatches)]
    for position, group in enumerate(rng.permutation(len(main_groups))):
        cells[position % len(cells)].extend(main_groups[group])
    # From the other end, so that the same cells do not get the odd group and the odd positive.
    for position, row in enumerate(rng.permutation(np.array(positives, dtype=np.int64))):
        cells[-1 - position % len(cells)].append(int(row))
    return plan
