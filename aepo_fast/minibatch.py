"""Splits a step's rows into minibatches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def plan_minibatches(
    main_groups: Sequence[Sequence[int]],
    positives: Sequence[int],
    *,
    num_minibatches: int,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Row indices of each minibatch.

    main_groups: rows of each prompt; groups are shuffled and kept whole, their numbers differ by
    at most one over the minibatches. positives: auxiliary rows with a gradient, spread the same
    way, so that AEPO's share is the same in every minibatch.
    """
    minibatches: list[list[int]] = [[] for _ in range(num_minibatches)]
    for position, group in enumerate(rng.permutation(len(main_groups))):
        minibatches[position % num_minibatches].extend(main_groups[group])
    # From the other end, so that no minibatch gets both the odd group and the odd positive.
    for position, row in enumerate(rng.permutation(np.array(positives, dtype=np.int64))):
        minibatches[-1 - position % num_minibatches].append(int(row))
    return minibatches
