"""Samples requests and gets their rewards; each rank does its own, and all have the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from aepo_fast.rewards.reward import Reward
from aepo_fast.rewards.scorer import GroupScorer, ScoredGroup
from aepo_fast.rollout.engine import RolloutEngine
from aepo_fast.samples import Completion, Prompt, Request
from aepo_fast.world import World


@dataclass(frozen=True)
class Scored:
    """Completions of each request with their texts and rewards.

    errors: samples that could not be scored. sampling_s: seconds, without scoring.
    """

    groups: list[list[Completion]]
    scores: list[ScoredGroup]
    errors: int
    sampling_s: float


def sample_and_score(
    engine: RolloutEngine,
    reward: Reward,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    decode: Callable[[Sequence[int]], str],
    *,
    world: World,
    max_new_tokens: int,
    overlap: bool,
    on_tokens: Callable[[int], None],
    on_group: Callable[[int, list[Completion]], None] = lambda index, group: None,
    lap: Callable[[str], None] = lambda phase: None,
) -> Scored:
    """Sample one request a prompt in one call and score them, by choice meanwhile.

    Raises RolloutError where sampling fails and RewardError as `GroupScorer.results` does, over
    ranks all of them what the first raised. on_tokens, on_group: as in `RolloutEngine.generate`, of
    this rank's requests; on_tokens is called with 0, too, while scoring takes its time. lap: is
    told when sampling is done ("rollout"). Of ranks that sample together, the first one scores.
    """
    num_samples = sum(request.num_samples for request in requests)

    def tokens(index: int) -> int:
        length = len(requests[index].prompt_ids) + max_new_tokens
        return length * requests[index].num_samples

    # Ranks that sample together have one part.
    part, place = divmod(world.rank, engine.ranks)
    sampling = replace(world, rank=part, size=world.size // engine.ranks)
    own = sampling.share(range(len(requests)), tokens)

    def work() -> tuple[dict[int, tuple[list[Completion], ScoredGroup]], int, str, float]:
        if place > 0:
            mine = [requests[index] for index in own]
            engine.generate(mine, max_new_tokens=max_new_tokens, on_tokens=on_tokens)
            return {}, 0, "", 0.0
        with GroupScorer(
            reward,
            [prompts[index] for index in own],
            decode,
            overlap=overlap,
            num_samples=num_samples,
            check=lambda: on_tokens(0),
        ) as scorer:

            def add(number: int, group: list[Completion]) -> None:
                scorer.add(number, group)
                on_group(own[number], group)

            start = time.perf_counter()
            groups = engine.generate(
                [requests[index] for index in own],
                max_new_tokens=max_new_tokens,
                on_tokens=on_tokens,
                on_group=add,
            )
            sampling_s = time.perf_counter() - start
            lap("rollout")
            pairs = zip(groups, scorer.results(), strict=True)
        found = dict(zip(own, pairs, strict=True))
        return found, scorer.errors, scorer.first_error, sampling_s

    parts = world.attempt(work)
    found = {index: pair for part, *_ in parts for index, pair in part.items()}
    errors = sum(errors for _, errors, *_ in parts)
    reward.check_share(errors, num_samples, next((x for *_, x, _ in parts if x), ""))
    return Scored(
        groups=[found[index][0] for index in range(len(requests))],
        scores=[found[index][1] for index in range(len(requests))],
        errors=errors,
        sampling_s=max(seconds for *_, seconds in parts),
    )
