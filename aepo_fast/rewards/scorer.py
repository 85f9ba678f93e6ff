"""Scores groups of completions, by choice while other groups are still being sampled."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from aepo_fast.rewards.reward import Reward
from aepo_fast.samples import Completion, Prompt


@dataclass(frozen=True)
class ScoredGroup:
    """Texts and rewards of a group's completions, None where one has no reward."""

    texts: list[str]
    rewards: list[float | None]


class GroupScorer:
    """Decodes and scores the groups of a rollout as they are added, one group a prompt.

    overlap: in a thread of its own, whatever has arrived in one call of the reward; otherwise all
    groups in one call at the end. Use as a context; leaving it early drops what is not scored.
    """

    def __init__(
        self,
        reward: Reward,
        prompts: Sequence[Prompt],
        decode: Callable[[Sequence[int]], str],
        *,
        overlap: bool,
    ) -> None:
        self.reward, self.prompts, self.decode = reward, prompts, decode
        self.errors = 0
        self._scored: dict[int, ScoredGroup] = {}
        self._arrived: queue.SimpleQueue[tuple[int, Sequence[Completion]] | None]
        self._arrived = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = None
        if overlap:
            self._thread = threading.Thread(target=self._work, daemon=True, name="scorer")
            self._thread.start()

    def __enter__(self) -> GroupScorer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._arrived.put(None)

    def add(self, group: int, completions: Sequence[Completion]) -> None:
        """Take a finished group; raises what an earlier one raised, so that sampling stops."""
        if self._failure is not None:
            raise self._failure
        self._arrived.put((group, completions))

    def results(self) -> list[ScoredGroup]:
        """Wait for all groups; raises RewardError as `Reward.score` does."""
        self._arrived.put(None)
        if self._thread is None:
            self._work()
        else:
            self._thread.join()
        if self._failure is not None:
            raise self._failure
        return [self._scored[group] for group in range(len(self.prompts))]

    def _work(self) -> None:
        going = True
        while going:
            batch = [self._arrived.get()]
            while not self._arrived.empty():
                batch.append(self._arrived.get())
            going = None not in batch
            try:
                self._score([item for item in batch if item is not None])
            except BaseException as error:  # raised again in the caller's thread
                self._failure = error
                return

    def _score(self, groups: list[tuple[int, Sequence[Completion]]]) -> None:
        flat = [completion for _, group in groups for completion in group]
        texts = [self.decode(completion.completion_ids) for completion in flat]
        scored = self.reward.score(
            [self.prompts[index] for index, group in groups for _ in group],
            texts,
            [completion.completion_ids for completion in flat],
        )
        self.errors += scored.errors
        start = 0
        for index, group in groups:
            stop = start + len(group)
            self._scored[index] = ScoredGroup(texts[start:stop], scored.rewards[start:stop])
            start = stop
