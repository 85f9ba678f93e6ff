"""Rollout and reward: from prompts to scored rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from aepo_fast.batch import Row
from aepo_fast.data import Prompt
from aepo_fast.losses import soft_overlong_penalty
from aepo_fast.rewards import Reward
from aepo_fast.rollout.base import Request, RolloutEngine


@dataclass(frozen=True)
class Rollout:
    """The scored rows of a step; groups 0..num_main_groups-1 are main, the others auxiliary.

    texts and task_rewards are per row; the latter are rewards before any length penalty.
    """

    rows: list[Row]
    prompts: list[Prompt]  # of each group
    texts: list[str]
    task_rewards: list[float | None]
    num_main_groups: int
    reward_errors: int

    @property
    def num_tokens(self) -> int:
        """Number of sampled tokens."""
        return sum(row.length for row in self.rows)

    @property
    def groups(self) -> torch.Tensor:
        """Group of each row: int64 [R]."""
        return torch.tensor([row.group for row in self.rows])

    @property
    def main_rewards(self) -> torch.Tensor:
        """Reward of each row, NaN for auxiliary rows and where scoring failed: fp32 [R]."""
        return torch.tensor(
            [float("nan") if row.is_aux or row.reward is None else row.reward for row in self.rows]
        )

    @property
    def main_groups(self) -> list[list[int]]:
        """Row indices of each main group."""
        members: list[list[int]] = [[] for _ in range(self.num_main_groups)]
        for index, row in enumerate(self.rows):
            if not row.is_aux:
                members[row.group].append(index)
        return members


def seed_of(*parts: int) -> int:
    """A seed that is a function of its parts, e.g. of run seed, step and request."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def collect(
    engine: RolloutEngine,
    reward: Reward,
    prompts: Sequence[Prompt],
    aux_prompts: Sequence[Prompt],
    decode: Callable[[Sequence[int]], str],
    *,
    group_size: int,
    aux_temperature: float,
    max_new_tokens: int,
    soft_overlong_tokens: int,
    seed: int,
    on_tokens: Callable[[int], None],
    lap: Callable[[str], None],
) -> Rollout:
    """Sample main prompts at temperature 1 and auxiliary ones at AEPO's in one call; score all.

    `lap` is told when sampling ("rollout") and scoring ("reward") are done.
    """
    everyone = [*prompts, *aux_prompts]
    requests = [
        Request(
            prompt.token_ids,
            group_size,
            1.0 if index < len(prompts) else aux_temperature,
            seed_of(seed, index),
        )
        for index, prompt in enumerate(everyone)
    ]
    groups = engine.generate(requests, max_new_tokens=max_new_tokens, on_tokens=on_tokens)
    lap("rollout")
    flat = [completion for group in groups for completion in group]
    texts = [decode(completion.completion_ids) for completion in flat]
    repeated = [prompt for prompt in everyone for _ in range(group_size)]
    scored = reward.score(repeated, texts, [completion.completion_ids for completion in flat])
    rows = []
    for index, (completion, value) in enumerate(zip(flat, scored.rewards, strict=True)):
        group = index // group_size
        is_aux = group >= len(prompts)
        if value is not None and not is_aux and soft_overlong_tokens:
            length = len(completion.completion_ids)
            value += soft_overlong_penalty(length, max_new_tokens, soft_overlong_tokens)
        rows.append(Row(completion, group, is_aux, value))
    lap("reward")
    return Rollout(
        rows=rows,
        prompts=everyone,
        texts=texts,
        task_rewards=scored.rewards,
        num_main_groups=len(prompts),
        reward_errors=scored.errors,
    )
