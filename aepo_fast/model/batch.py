"""From samples to the tensors of a forward pass: packed, prompt-sharing or padded.

All three layouts give each completion token the same context and position, so they give the same
log-probs up to rounding; they differ in how many other tokens the model has to process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from aepo_fast.model.kept import kept_ids
from aepo_fast.samples import Sample

Layout = Literal["packed", "shared", "padded"]
# What a micro-batch costs beside its tokens, in tokens: all weights are read once more, and their
# gradients added up. A GPU also waits for thousands of kernels to be launched. Processes gather all
# weights and share out all gradients: with gloo 5 s, as 1,200 tokens take there
# (bench/results/cpu/scale-20261129-035407.json beside scale-20261129-035707.json).
BATCH_TOKENS, RANK_BATCH_TOKENS, GPU_BATCH_TOKENS = 128, 1024, 2048


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass needs, and where its completion tokens are.

    input_ids, position_ids: [B, L]. attention_mask: None (packed: position_ids restart),
    bool [B, 1, L, L] (shared) or int [B, L] (padded). select: [N], flat positions in [B * L] whose
    output predicts a completion token. targets: [N], those tokens. sample_of_token: [N], indices
    into `samples`; tokens of a sample are consecutive and in order. samples: indices into the
    step's samples. share: of the model tokens of all micro-batches that were made together. idle:
    it only keeps step with other processes and counts for nothing. kept_ids: int32 [N, K], see
    `Completion`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    select: torch.Tensor
    targets: torch.Tensor
    sample_of_token: torch.Tensor
    samples: tuple[int, ...]
    share: float = 1.0
    idle: bool = False
    kept_ids: torch.Tensor | None = None

    @property
    def valid(self) -> torch.Tensor:
        """False for padding: bool [B, L]."""
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        first = torch.arange(self.position_ids.shape[1]) == 0
        return (self.position_ids > 0) | first  # padding has position 0 behind all tokens


@dataclass
class Element:
    """One line of a batch, or a part of a packed one: a prompt and the completions after it."""

    prompt: tuple[int, ...]
    samples: list[int]
    length: int


def make_microbatches(
    samples: Sequence[Sample],
    indices: Sequence[int],
    *,
    layout: Layout,
    max_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
) -> list[MicroBatch]:
    """Split samples[indices] into micro-batches of at most `max_tokens` model tokens each.

    A single sample longer than `max_tokens` gets a micro-batch of its own. Samples without
    completion tokens are left out. Tensors are on the CPU. batch_tokens: padding that one
    micro-batch fewer is worth.
    """
    batches = split_elements(
        samples, indices, layout=layout, max_tokens=max_tokens, batch_tokens=batch_tokens
    )
    make = _packed if layout == "packed" else _lines
    total = sum(element.length for batch in batches for element in batch)
    found = []
    for batch in batches:
        made, share = make(samples, batch), sum(one.length for one in batch) / total
        found.append(replace(made, share=share, kept_ids=kept_ids(samples, made.samples)))
    return found


def split_elements(
    samples: Sequence[Sample],
    indices: Sequence[int],
    *,
    layout: Layout,
    max_tokens: int,
    batch_tokens: int,
) -> list[list[Element]]:
    """What each micro-batch of `make_microbatches` holds, before any tensor is made."""
    elements = _elements(samples, indices, shared=layout == "shared", max_tokens=max_tokens)
    elements.sort(key=lambda element: -element.length)
    if layout == "packed":
        return _fill(elements, max_tokens)
    return _split(elements, max_tokens, batch_tokens)


def _fill(elements: list[Element], max_tokens: int) -> list[list[Element]]:
    batches: list[list[Element]] = []
    used = 0
    for element in elements:
        if not batches or used + element.length > max_tokens:
            batches.append([])
            used = 0
        batches[-1].append(element)
        used += element.length
    return batches


def _split(elements: list[Element], max_tokens: int, batch_tokens: int) -> list[list[Element]]:
    """Split elements, longest first, so that lines padded to their batch's first cost the least."""
    costs, starts = [0], [0]  # of the best split of the elements before each; its last batch
    for stop in range(1, len(elements) + 1):
        found: list[tuple[int, int]] = []
        for start in range(stop - 1, -1, -1):
            tokens = elements[start].length * (stop - start)
            if found and tokens > max_tokens:
                break
            found.append((costs[start] + tokens + batch_tokens, start))
        cost, start = min(found)
        costs.append(cost)
        starts.append(start)
    batches, stop = [], len(elements)
    while stop:
        batches.append(elements[starts[stop] : stop])
        stop = starts[stop]
    return batches[::-1]


def _elements(
    samples: Sequence[Sample], indices: Sequence[int], *, shared: bool, max_tokens: int
) -> list[Element]:
    elements: list[Element] = []
    open_for: dict[tuple[int, ...], Element] = {}
    for index in indices:
        completion = samples[index].completion
        if not completion.completion_ids:
            continue
        # The last token predicts nothing, so the model never sees it.
        extra = len(completion.completion_ids) - 1
        element = open_for.get(completion.prompt_ids)
        if not shared or element is None or element.length + extra > max_tokens:
            element = Element(completion.prompt_ids, [], len(completion.prompt_ids))
            elements.append(element)
            open_for[completion.prompt_ids] = element
        element.samples.append(index)
        element.length += extra
    return elements


class _Tokens:
    """Collects the completion tokens of a micro-batch and where they are predicted."""

    def __init__(self) -> None:
        self.select: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []
        self.sample_of_token: list[torch.Tensor] = []
        self.samples: list[int] = []

    def add(self, sample: int, ids: tuple[int, ...], prompt_end: int, start: int) -> None:
        """Add a completion predicted first at `prompt_end`, then from `start` on."""
        positions = torch.arange(start - 1, start + len(ids) - 1)
        positions[0] = prompt_end
        self.select.append(positions)
        self.targets.append(torch.tensor(ids))
        self.sample_of_token.append(torch.full((len(ids),), len(self.samples)))
        self.samples.append(sample)

    def finish(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> MicroBatch:
        return MicroBatch(
            ids,
            positions,
            mask,
            torch.cat(self.select),
            torch.cat(self.targets),
            torch.cat(self.sample_of_token),
            tuple(self.samples),
        )


def _lines(samples: Sequence[Sample], batch: list[Element]) -> MicroBatch:
    width = batch[0].length
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    positions = torch.zeros(len(batch), width, dtype=torch.long)
    # 0: prompt, k: k-th completion of the line, -1: padding
    segments = torch.full((len(batch), width), -1)
    tokens = _Tokens()
    for line, element in enumerate(batch):
        end = len(element.prompt)
        ids[line, :end] = torch.tensor(element.prompt)
        positions[line, :end] = torch.arange(end)
        segments[line, :end] = 0
        cursor = end
        for number, sample in enumerate(element.samples, start=1):
            completion = samples[sample].completion.completion_ids
            stop = cursor + len(completion) - 1
            ids[line, cursor:stop] = torch.tensor(completion[:-1], dtype=torch.long)
            positions[line, cursor:stop] = torch.arange(end, end + stop - cursor)
            segments[line, cursor:stop] = number
            base = line * width
            tokens.add(sample, completion, base + end - 1, base + cursor)
            cursor = stop
    if all(len(element.samples) == 1 for element in batch):
        return tokens.finish(ids, positions, (segments >= 0).long())
    visible = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    # Padding sees itself: a row of attention with nothing to see would be NaN.
    mask = (visible & torch.ones(width, width, dtype=torch.bool).tril())[:, None]
    return tokens.finish(ids, positions, mask)


def _packed(samples: Sequence[Sample], batch: list[Element]) -> MicroBatch:
    width = sum(element.length for element in batch)
    ids = torch.zeros(1, width, dtype=torch.long)
    positions = torch.zeros(1, width, dtype=torch.long)
    tokens = _Tokens()
    cursor = 0
    for element in batch:
        (sample,) = element.samples
        completion = samples[sample].completion.completion_ids
        end = cursor + len(element.prompt)
        ids[0, cursor : cursor + element.length] = torch.tensor(element.prompt + completion[:-1])
        positions[0, cursor : cursor + element.length] = torch.arange(element.length)
        tokens.add(sample, completion, end - 1, end)
        cursor += element.length
    return tokens.finish(ids, positions, None)
