"""The endless, reshuffled stream of training prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import Config
from aepo_fast.data.prompts import PromptSet, digest
from aepo_fast.samples import Prompt


class PromptSampler:
    """An endless stream of prompts: sources interleaved by weight, each reshuffled every epoch."""

    def __init__(self, prompts: Sequence[Prompt], weights: Sequence[float], seed: int) -> None:
        self.seed = seed
        self.weights = list(weights)
        self.by_source: list[list[Prompt]] = [[] for _ in weights]
        for prompt in prompts:
            self.by_source[prompt.source].append(prompt)
        assert all(self.by_source), "every source needs a prompt"
        self.fingerprint = digest("\n".join(f"{p.source} {p.token_ids}" for p in prompts))
        self.drawn = [0] * len(self.weights)  # of each source

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        return [self._draw() for _ in range(count)]

    def _draw(self) -> Prompt:
        # The source that is furthest behind its share: every batch has the mix that was asked for.
        behind = [(drawn + 1) / w for drawn, w in zip(self.drawn, self.weights, strict=True)]
        source = behind.index(min(behind))
        prompts = self.by_source[source]
        epoch, position = divmod(self.drawn[source], len(prompts))
        self.drawn[source] += 1
        order = np.random.default_rng([self.seed, source, epoch]).permutation(len(prompts))
        return prompts[order[position]]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"drawn": list(self.drawn), "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; raises ConfigError if the prompts are not the same."""
        if state["fingerprint"] != self.fingerprint:
            reason = "its prompts are not those of the checkpoint"
            fix = "Restore data and template, or start a new run"
            names = [len(prompts) for prompts in self.by_source]
            raise ConfigError("data.sources", f"{names} prompts", reason, fix)
        self.drawn = list(state["drawn"])


def make_sampler(cfg: Config, prompts: PromptSet) -> PromptSampler:
    """The endless, reshuffled stream of training prompts."""
    weights = [source.weight for source in cfg.data.sources]
    return PromptSampler(prompts.train, weights, cfg.trainer.seed)
