"""Where a policy's entropy lives: in right and wrong samples, in answers and before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from aepo_fast.rewards.answer_span import answer_tokens
from aepo_fast.samples import Rollout, token_index, token_offsets


def entropy_metrics(
    rollout: Rollout,
    entropy: torch.Tensor,
    indices: Sequence[int],
    threshold: float,
    decode: Callable[[Sequence[int]], str],
) -> dict[str, float]:
    """Token means of the entropy over parts of samples[indices], NaN for a part without tokens.

    entropy: nats, of the tokens of all samples: [tokens]. indices: main samples that have a task
    reward, which counts as correct from `threshold` on.
    """
    offsets = token_offsets(rollout.samples)
    correct = torch.zeros(len(entropy), dtype=torch.bool)
    answer = correct.clone()
    for index in indices:
        first, last = int(offsets[index]), int(offsets[index + 1])
        reward = rollout.samples[index].task_reward
        correct[first:last] = reward is not None and reward >= threshold
        ids = rollout.samples[index].completion.completion_ids
        found = answer_tokens(rollout.texts[index], ids, decode)
        answer[first + found.start : first + found.stop] = True
    tokens = token_index(offsets, indices)
    values, correct, answer = entropy[tokens], correct[tokens], answer[tokens]
    return {
        "entropy/correct": values[correct].mean().item(),
        "entropy/wrong": values[~correct].mean().item(),
        "entropy/answer": values[answer].mean().item(),
        "entropy/rest": values[~answer].mean().item(),
    }
