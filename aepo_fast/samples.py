"""What a step passes on: prompts, requests, completions, samples and their flat token index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
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
    """One prompt to sample from: token ids, the number of samples, temperature and seed.

    temperature: 0 takes the most likely token. top_k: above 0, only so many of the most likely
    tokens are drawn from. top_p: below 1, only the fewest of these whose probabilities sum to it or
    more (arXiv 1904.09751). with_kept: completions carry the ids that were kept, with a top_k.
    """

    prompt_ids: tuple[int, ...]
    num_samples: int
    temperature: float
    seed: int  # sample i of the request uses a stream of its own, derived from (seed, i)
    top_p: float = 1.0
    top_k: int = 0
    with_kept: bool = False


@dataclass(frozen=True)
class Completion:
    """One sampled completion, exactly as sampled: its ids are never decoded and re-encoded.

    `logprobs` are those of the sampling law, softmax(logits / temperature), one per id, in nats;
    of temperature 0 those of temperature 1, with top_k or top_p those among the tokens that were
    kept. `kept_ids`: the ids of these, int32 [tokens, K], padded with -1; None where all are.
    `finish_reason` is "stop" when the last id ends the sequence or completes a string of
    `rollout.stop`, and "length" when it was cut.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    temperature: float
    weights_version: int
    kept_ids: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Sample:
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


def sampler_logprobs(samples: Sequence[Sample]) -> torch.Tensor:
    """The sampler's log-probs of all tokens, sample after sample: fp32 [total tokens]."""
    return torch.tensor([value for sample in samples for value in sample.completion.logprobs])


@dataclass(frozen=True)
class TokenValues:
    """Log-probs and entropies of a policy, of all tokens of a step's samples, in nats.

    [total tokens] each, sample after sample, fp32, on the CPU. second_logprob: at the second
    temperature, None where there is none.
    """

    logprob: torch.Tensor
    entropy: torch.Tensor
    second_logprob: torch.Tensor | None


def token_offsets(samples: Sequence[Sample]) -> torch.Tensor:
    """Where each sample's tokens start in a flat per-token tensor: int64 [R + 1]."""
    lengths = torch.tensor([sample.length for sample in samples], dtype=torch.long)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def token_index(offsets: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
    """Flat positions of the tokens of some samples, in their order."""
    spans = [torch.arange(int(offsets[sample]), int(offsets[sample + 1])) for sample in samples]
    return torch.cat(spans) if spans else torch.zeros(0, dtype=torch.long)


def token_mean(
    values: torch.Tensor, samples: Sequence[Sample], indices: Sequence[int]
) -> tuple[float, float]:
    """Mean of a per-token value over the tokens of samples[indices], and its standard error.

    The error is that of a ratio of sums over prompts, whose samples have more in common than those
    of others: sqrt(G / (G - 1) sum_g (S_g - mean N_g)^2) / N. NaN with fewer than two prompts.
    """
    lengths, chosen = torch.tensor([sample.length for sample in samples]), torch.tensor(indices)
    groups = torch.tensor([samples[index].group for index in indices])
    sample_of_token = torch.arange(len(samples)).repeat_interleave(lengths)
    sums = torch.zeros(len(samples), dtype=torch.float64)
    sums = sums.index_add_(0, sample_of_token, values.double())[chosen]
    counts = lengths[chosen].double()
    mean = sums.sum() / counts.sum()
    _, position = groups.unique(return_inverse=True)
    residuals = torch.zeros(int(position.max()) + 1, dtype=torch.float64)
    residuals.index_add_(0, position, sums - mean * counts)
    spread = residuals.square().sum() * len(residuals) / (len(residuals) - 1 or math.nan)
    return mean.item(), (spread.sqrt() / counts.sum()).item()


@dataclass(frozen=True)
class Rollout:
    """The scored samples of a step; groups 0..num_main_groups-1 are main, the others auxiliary.

    texts: of each sample.
    """

    samples: list[Sample]
    prompts: list[Prompt]  # of each group
    texts: list[str]
    num_main_groups: int
    reward_errors: int
    sampling_s: float  # seconds, of all but scoring

    @property
    def num_tokens(self) -> int:
        """Number of sampled tokens."""
        return sum(sample.length for sample in self.samples)

    @property
    def groups(self) -> torch.Tensor:
        """Group of each sample: int64 [R]."""
        return torch.tensor([sample.group for sample in self.samples])

    @property
    def main_rewards(self) -> torch.Tensor:
        """Reward of each sample, NaN for auxiliary samples and where scoring failed: fp32 [R]."""
        return torch.tensor(
            [
                float("nan") if sample.is_aux or sample.reward is None else sample.reward
                for sample in self.samples
            ]
        )

    @property
    def main_groups(self) -> list[list[int]]:
        """Sample indices of each main group."""
        members: list[list[int]] = [[] for _ in range(self.num_main_groups)]
        for index, sample in enumerate(self.samples):
            if not sample.is_aux:
                members[sample.group].append(index)
        return members

    def state_dict(self) -> dict[str, Any]:
        """All but the prompts, as plain values."""
        return {
            "rows": [_plain(sample) for sample in self.samples],
            "texts": self.texts,
            "num_main_groups": self.num_main_groups,
            "reward_errors": self.reward_errors,
            "sampling_s": self.sampling_s,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], prompts: list[Prompt]) -> Rollout:
        """The rollout whose `state_dict` was saved."""
        samples = [
            Sample(**{**sample, "completion": _completion(sample["completion"])})
            for sample in state["rows"]
        ]
        # Older checkpoints repeat what each sample says of itself.
        own = ("rows", "task_rewards")
        others = {name: value for name, value in state.items() if name not in own}
        return cls(samples=samples, prompts=prompts, **others)


def _plain(sample: Sample) -> dict[str, Any]:
    """A sample as checkpoints have it: their reader takes tensors, and no arrays."""
    values, kept = asdict(sample), sample.completion.kept_ids
    values["completion"]["kept_ids"] = None if kept is None else torch.from_numpy(kept)
    return values


def _completion(values: dict[str, Any]) -> Completion:
    kept = values.get("kept_ids")  # older checkpoints have none
    return Completion(**{**values, "kept_ids": None if kept is None else kept.numpy()})


def seed_of(*parts: int) -> int:
    """A seed that is a function of its parts, e.g. of run seed, step and request."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1


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
