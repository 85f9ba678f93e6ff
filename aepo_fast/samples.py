"""What a step passes on: prompts, requests, completions, samples and their flat token index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch


@dataclass(frozen=True)
class Prompt:
    """One question as the model sees it.

    key: what it shares with questions that must fall on its side of the hold-out. messages: the
    chat. columns: its row, with the question as read under "prompt"; the reward's input. source:
    index into data.sources. token_ids: of the rendered chat, up to the assistant's turn.
    """

    key: str
    messages: tuple[dict[str, str], ...]
    columns: dict[str, Any]
    source: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """One prompt to sample from: token ids, the number of samples, temperature and seed."""

    prompt_ids: tuple[int, ...]
    num_samples: int
    temperature: float
    seed: int  # sample i of the request uses a stream of its own, derived from (seed, i)


@dataclass(frozen=True)
class Completion:
    """One sampled completion, exactly as sampled: its ids are never decoded and re-encoded.

    `logprobs` are those of the sampling law, softmax(logits / temperature), one per id, in nats.
    `finish_reason` is "stop" when the last id ends the sequence and "length" when it was cut.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    temperature: float
    weights_version: int


@dataclass(frozen=True)
class Row:
    """One sampled completion with what the loss needs to know about it.

    group: index of its prompt among the prompts of the step. is_aux: sampled at AEPO's
    temperature, outside the group statistics. task_reward: of the answer itself, None where scoring
    failed and was counted. length_penalty: what its length adds to that, 0 or less.
    """

    completion: Completion
    group: int
    is_aux: bool
    task_reward: float | None
    length_penalty: float = 0.0

    @property
    def reward(self) -> float | None:
        """What the advantage is made of."""
        return None if self.task_reward is None else self.task_reward + self.length_penalty

    @property
    def length(self) -> int:
        """Number of completion tokens."""
        return len(self.completion.completion_ids)


def sampler_logprobs(rows: Sequence[Row]) -> torch.Tensor:
    """The sampler's log-probs of all completion tokens, row after row: fp32 [total tokens]."""
    return torch.tensor([value for row in rows for value in row.completion.logprobs])


@dataclass(frozen=True)
class Scores:
    """Per-token values of a step's rows, row after row: [total tokens], fp32, on the CPU."""

    logprob: torch.Tensor
    entropy: torch.Tensor
    second_logprob: torch.Tensor | None


def token_offsets(rows: Sequence[Row]) -> torch.Tensor:
    """Where each row's tokens start in a flat per-token tensor: int64 [R + 1]."""
    lengths = torch.tensor([row.length for row in rows], dtype=torch.long)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def token_index(offsets: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Flat positions of the tokens of some rows, in their order."""
    spans = [torch.arange(int(offsets[row]), int(offsets[row + 1])) for row in rows]
    return torch.cat(spans) if spans else torch.zeros(0, dtype=torch.long)


def token_mean(
    values: torch.Tensor, rows: Sequence[Row], indices: Sequence[int]
) -> tuple[float, float]:
    """Mean of a per-token value over the tokens of rows[indices], and its standard error.

    The error is that of a ratio of sums over prompts, whose samples have more in common than those
    of others: sqrt(G / (G - 1) sum_g (S_g - mean N_g)^2) / N. NaN with fewer than two prompts.
    """
    offsets = token_offsets(rows)
    groups = torch.tensor([rows[index].group for index in indices])
    sums = torch.stack([values[offsets[i] : offsets[i + 1]].double().sum() for i in indices])
    counts = (offsets[1:] - offsets[:-1])[torch.tensor(indices)].double()
    mean = sums.sum() / counts.sum()
    _, position = groups.unique(return_inverse=True)
    residuals = torch.zeros(int(position.max()) + 1, dtype=torch.float64)
    residuals.index_add_(0, position, sums - mean * counts)
    spread = residuals.square().sum() * len(residuals) / (len(residuals) - 1 or math.nan)
    return mean.item(), (spread.sqrt() / counts.sum()).item()


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

    target: the entropy aimed at, nats. requests: one per prompt, the main ones first.
    sampler_state: where the stream of prompts stood before.
    """

    step: int
    prompts: list[Prompt]
    aux_prompts: list[Prompt]
    temperature: float
    target: float
    requests: list[Request]
    sampler_state: dict[str, Any]
