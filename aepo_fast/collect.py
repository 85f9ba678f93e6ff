"""Rollout and reward: from prompts to scored rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from aepo_fast.batch import Row
from aepo_fast.config import Config
from aepo_fast.data import Prompt
from aepo_fast.losses import soft_overlong_penalty
from aepo_fast.rewards import Reward
from aepo_fast.rollout.base import Completion, Request, RolloutEngine
from aepo_fast.scoring import GroupScorer


@dataclass(frozen=True)
class Rollout:
    """The scored rows of a step; groups 0..num_main_groups-1 are main, the others auxiliary.

    texts: of each row.
    """

    rows: list[Row]
    prompts: list[Prompt]  # of each group
    texts: list[str]
    num_main_groups: int
    reward_errors: int
    sampling_s: float  # seconds, of all but scoring

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

    def state_dict(self) -> dict[str, Any]:
        """All but the prompts, as plain values."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "texts": self.texts,
            "num_main_groups": self.num_main_groups,
            "reward_errors": self.reward_errors,
            "sampling_s": self.sampling_s,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], prompts: list[Prompt]) -> Rollout:
        """The rollout whose `state_dict` was saved."""
        rows = [
            Row(**{**row, "completion": Completion(**row["completion"])}) for row in state["rows"]
        ]
        # Older checkpoints repeat what each row says of itself.
        others = {name: value for name, value in state.items() if name != "task_rewards"}
        return cls(**{**others, "rows": rows, "prompts": prompts})


def seed_of(*parts: int) -> int:
    """A seed that is a function of its parts, e.g. of run seed, step and request."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class RolloutPlan:
    """What a step samples: prompts at temperature 1, auxiliary ones at AEPO's temperature.

    target: the entropy aimed at, nats. sampler_state: where the stream of prompts stood before.
    """

    step: int
    prompts: list[Prompt]
    aux_prompts: list[Prompt]
    temperature: float
    target: float
    sampler_state: dict[str, Any]

    def requests(self, group_size: int, seed: int) -> list[Request]:
        """One request per prompt, the main ones first."""
        everyone = [*self.prompts, *self.aux_prompts]
        step_seed = seed_of(seed, self.step)
        return [
            Request(
                prompt.token_ids,
                group_size,
                1.0 if index < len(self.prompts) else self.temperature,
                seed_of(step_seed, index),
            )
            for index, prompt in enumerate(everyone)
        ]


def collect(
    engine: RolloutEngine,
    reward: Reward,
    plan: RolloutPlan,
    decode: Callable[[Sequence[int]], str],
    cfg: Config,
    *,
    on_tokens: Callable[[int], None],
    lap: Callable[[str], None],
) -> Rollout:
    """Sample all of a plan's prompts in one call and score them, by choice meanwhile.

    `lap` is told when sampling ("rollout") and scoring ("reward") are done.
    """
    everyone = [*plan.prompts, *plan.aux_prompts]
    with GroupScorer(reward, everyone, decode, overlap=cfg.reward.overlap) as scorer:
        start = time.perf_counter()
        groups = engine.generate(
            plan.requests(cfg.trainer.group_size, cfg.trainer.seed),
            max_new_tokens=cfg.rollout.max_new_tokens,
            on_tokens=on_tokens,
            on_group=scorer.add,
        )
        sampling_s = time.perf_counter() - start
        lap("rollout")
        scored = scorer.results()
    rows = []
    for index, (group, scores) in enumerate(zip(groups, scored, strict=True)):
        is_aux = index >= len(plan.prompts)
        for completion, value in zip(group, scores.rewards, strict=True):
            penalty = soft_overlong_penalty(
                len(completion.completion_ids),
                cfg.rollout.max_new_tokens,
                cfg.reward.soft_overlong_tokens,
            )
            rows.append(Row(completion, index, is_aux, value, 0.0 if is_aux else penalty))
    lap("reward")
    return Rollout(
        rows=rows,
        prompts=everyone,
        texts=[text for group in scored for text in group.texts],
        num_main_groups=len(plan.prompts),
        reward_errors=scorer.errors,
        sampling_s=sampling_s,
    )
