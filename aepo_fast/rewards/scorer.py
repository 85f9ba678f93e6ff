"""Scores groups of completions, by choice while other groups are still being sampled."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from aepo_fast.rewards.reward import Reward
from aepo_fast.samples import Completion, Prompt

_CHECK_S = 0.1  # between two calls of `check`


@dataclass(frozen=True)
class ScoredGroup:
    """Texts and rewards of a group's completions, None where one has no reward."""

    texts: list[str]
    rewards: list[float | None]


class GroupScorer:
    """Decodes and scores the groups of a rollout as they are added, one group a prompt.

    overlap: whatever has arrived in one call of the reward; otherwise all groups in one call at the
    end. Either runs in a thread. num_samples: of all groups. `check` is called while `results`
    waits, and may raise. Use as a context; leaving it early drops what is not scored, and ends the
    reward where it is still at work.
    """

    def __init__(
        self,
        reward: Reward,
        prompts: Sequence[Prompt],
        decode: Callable[[Sequence[int]], str],
        *,
        overlap: bool,
        num_samples: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.reward, self.prompts, self.decode, self.check = reward, prompts, decode, check
        self.errors, self.num_samples = 0, num_samples
        self.first_error = ""
        self._scored: dict[int, ScoredGroup] = {}
        self._arrived: queue.SimpleQueue[tuple[int, Sequence[Completion]] | None]
        self._arrived = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="scorer")
        if overlap:
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
        if error is not None and self._thread.is_alive():
            self.reward.abandon()

    def add(self, group: int, completions: Sequence[Completion]) -> None:
        """Take a finished group; raises what an earlier one raised, so that sampling stops."""
        if self._failure is not None:
            raise self._failure
        self._arrived.put((group, completions))

    def results(self) -> list[ScoredGroup]:
        """Wait for all groups.

        Raises RewardError as `Reward.score` and `Reward.check_share` do.
        """
        self._arrived.put(None)
        if self._thread.ident is None:
            self._thread.start()
        while self._thread.is_alive():
            self.check()
            self._thread.join(_CHECK_S)
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
            warn=not self.errors,
        )
        self.errors += scored.errors
        self.first_error = self.first_error or scored.first
        self.reward.check_share(self.errors, self.num_samples, self.first_error)
        start = 0
        for index, group in groups:
            stop = start + len(group)
            self._scored[index] = ScoredGroup(texts[start:stop], scored.rewards[start:stop])
            start = stop
