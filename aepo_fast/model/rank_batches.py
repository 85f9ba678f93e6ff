"""The micro-batches of one rank, as many as any other has: they gather weights together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from aepo_fast.model.batch import Layout, MicroBatch, make_microbatches, split_elements
from aepo_fast.samples import Sample
from aepo_fast.world import World


def microbatches_of_rank(
    world: World,
    samples: Sequence[Sample],
    indices: Sequence[int],
    *,
    layout: Layout,
    max_tokens: int,
    batch_tokens: int,
) -> list[MicroBatch]:
    """This rank's micro-batches of samples[indices], as many as that of any other rank.

    All ranks know all samples, so each knows the parts of the others. Samples that share a prompt
    in their layout stay together, unless there are fewer prompts than ranks. What a rank lacks are
    idle ones of the shortest sample. Arguments as those of `make_microbatches`.
    """
    options = {"layout": layout, "max_tokens": max_tokens, "batch_tokens": batch_tokens}
    indices = [index for index in indices if samples[index].length]
    units = [[index] for index in indices]
    if layout == "shared":
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for index in indices:
            by_prompt.setdefault(samples[index].completion.prompt_ids, []).append(index)
        if len(by_prompt) >= world.size:
            units = list(by_prompt.values())

    def tokens(index: int) -> int:
        return len(samples[index].completion.prompt_ids) + samples[index].length

    shares = world.shares(units, lambda unit: sum(map(tokens, unit)))
    parts = [[index for unit in share for index in unit] for share in shares]
    count = max(len(split_elements(samples, part, **options)) for part in parts)
    own = make_microbatches(samples, parts[world.rank], **options)
    if len(own) < count:
        (shortest,) = make_microbatches(samples, [min(indices, key=tokens)], **options)
        own += [dataclasses.replace(shortest, idle=True)] * (count - len(own))
    return own
