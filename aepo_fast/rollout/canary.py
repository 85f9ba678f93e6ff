"""Proof that rollouts come from the weights just trained: a canary's log-probs, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from aepo_fast.model.policy import Policy
from aepo_fast.rollout.engine import RolloutEngine
from aepo_fast.samples import Request, Sample

# What differs between two engines with the same weights varies from sample to sample; stale
# weights differ by more than half as much again.
_SLACK = 1.5
_ROUNDING = 1e-4  # nats, where both compute in float32
_DRAWS = 4  # one draw of some hundred tokens is a sixth off now and then
_TOKENS = 8  # of a sample, at most


class StaleWeightsError(RuntimeError):
    """The rollout engine does not sample with the trainer's weights."""


class Canary:
    """Compares log-probs of the rollout engine with the trainer's on a few short samples.

    prompts: token ids. Comparisons before anything was trained or transferred say by how much the
    engines differ by themselves; a later one must stay within 1.5 times that. Where one does not,
    more samples decide. Each rank compares with an engine of its own; where one of them fails, all
    of them raise the error. kept: what a run's requests say of the tokens to draw from.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        policy: Policy,
        prompts: Sequence[tuple[int, ...]],
        *,
        samples: int = 4,
        max_new_tokens: int = _TOKENS,
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine, self.policy, self.world = engine, policy, policy.machine.world
        self.max_new_tokens = min(max_new_tokens, _TOKENS)
        self.prompts, self.samples, self.kept = list(prompts), samples, kept or {}
        self.fresh = self._mean_difference()

    @property
    def limit(self) -> float:
        """The largest mean difference that passes, nats."""
        return _SLACK * self.fresh + _ROUNDING

    def _mean_difference(self) -> float:
        return sum(self.difference(draw) for draw in range(_DRAWS)) / _DRAWS

    def difference(self, draw: int = 0) -> float:
        """Mean of |sampler's log-prob - trainer's| over the tokens of one draw, nats.

        Of this rank's engine; all of them compute the trainer's log-probs of all ranks' samples.
        """
        requests = [
            Request(prompt, self.samples, 1.0, draw * len(self.prompts) + index, **self.kept)
            for index, prompt in enumerate(self.prompts)
        ]
        by_rank = self.world.attempt(
            lambda: self.engine.generate(requests, max_new_tokens=self.max_new_tokens)
        )
        groups = [completions for groups in by_rank for completions in groups]
        samples = [
            Sample(completion, group, False, None)
            for group, completions in enumerate(groups)
            for completion in completions
        ]
        values = self.policy.token_values(samples, range(len(samples)))
        sampled = torch.tensor([x for sample in samples for x in sample.completion.logprobs])
        differences = (values.logprob - sampled).abs()
        lengths = [
            sum(len(one.completion_ids) for group in groups for one in group) for groups in by_rank
        ]
        return differences.split(lengths)[self.world.rank].mean().item()

    def check(self) -> float:
        """The difference now, the greatest of all ranks.

        Raises StaleWeightsError on all of them where it is beyond the limit of one.
        """
        found = self.difference()
        if self.world.most(not found <= self.limit):
            found = self._mean_difference()
        self.world.together(lambda: self._judge(found))
        return self.world.most(found)

    def _judge(self, found: float) -> None:
        if not found <= self.limit:
            raise StaleWeightsError(
                f"rollouts of weights version {self.engine.weights_version}: their log-probs "
                f"differ from the trainer's by {found:.4f} nats on average, where "
                f"{self.fresh:.4f} was measured before training and {self.limit:.4f} is allowed. "
                "The engine samples with other weights. The last checkpoint is sound: go on with "
                "--resume; if it happens again, with rollout.share_weights = false or "
                'rollout.backend = "hf"'
            )
