"""What a rollout engine takes and gives back; every backend implements `RolloutEngine`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import nn

from aepo_fast.samples import Completion, Request


class RolloutError(RuntimeError):
    """Sampling failed; the weights are as they were, so the run can be saved and resumed."""


class BrokenWeightsError(RolloutError):
    """Sampling failed because of the weights, which are not to be saved."""


class RolloutEngine(Protocol):
    """Samples completions with the trainer's weights.

    verify: whether a canary should compare its log-probs with the trainer's after each sync.
    metrics: figures of its latest doings, for the log of the step. ranks: neighbours among the
    processes of a run that sample the same requests together.
    """

    verify: bool
    ranks: int
    weights_version: int
    metrics: dict[str, float]

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        on_tokens: Callable[[int], None] | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample every request; returns one list of `num_samples` completions per request.

        `on_tokens` is called often, with the number of tokens sampled since its last call;
        `on_group` with a request's index and completions as soon as they are all there. Raises
        RolloutError where sampling fails; what either callback raises ends it, too.
        """
        ...

    def sleep(self) -> None:
        """Release what only sampling needs, until the next `generate`."""
        ...

    def sync_weights(self, model: nn.Module, version: int) -> None:
        """Take over the trainer's weights; later completions carry `version`."""
        ...

    def close(self) -> None:
        """Release the engine's memory."""
        ...
