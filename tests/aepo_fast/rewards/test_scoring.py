"""Scoring while sampling goes on: same result, whole groups, failures heard at once."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aepo_fast.config.method import AepoConfig
from aepo_fast.config.sections import RewardConfig, RolloutConfig
from aepo_fast.method.objective import is_positive
from aepo_fast.rewards.reward import Reward, RewardError
from aepo_fast.rewards.scorer import GroupScorer
from aepo_fast.rewards.user_function import Score
from aepo_fast.rollout.sampling import collect
from aepo_fast.samples import Completion, Prompt, Request, Rollout, RolloutPlan
from tests.tiny_run import tiny_config


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(i), ({"content": f"question {i}"},), {}, 0, (i,)) for i in range(count)]


def group(*ids: int) -> list[Completion]:
    return [Completion((1,), (value,), (-1.0,), "stop", 1.0, 0) for value in ids]


def decode(ids: Sequence[int]) -> str:
    return f"text {ids[0]}"


class Recorder:
    """A reward that is the completion's id, None for 7; it notes what it was called with."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, str]]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(
        self, asked: Sequence[Prompt], texts: Sequence[str], ids: Sequence[Sequence[int]]
    ) -> list[Score]:
        self.calls.append([(p.key, text) for p, text in zip(asked, texts, strict=True)])
        assert self.gate.wait(30)
        return [Score(None if one[0] == 7 else float(one[0])) for one in ids]

    def reward(self) -> Reward:
        return Reward("recorder", (), self, RewardConfig())


@pytest.mark.parametrize("overlap", [True, False])
def test_groups_in_any_order_get_their_own_rewards(overlap: bool) -> None:
    recorder = Recorder()
    with GroupScorer(
        recorder.reward(), prompts(4), decode, overlap=overlap, num_samples=5
    ) as scorer:
        for index, completions in ((2, group(5, 7)), (0, group(1)), (3, group()), (1, group(2, 3))):
            scorer.add(index, completions)
        scored = scorer.results()
    assert [one.rewards for one in scored] == [[1.0], [2.0, 3.0], [5.0, None], []]
    assert [one.texts for one in scored] == [
        ["text 1"],
        ["text 2", "text 3"],
        ["text 5", "text 7"],
        [],
    ]
    asked = [pair for call in recorder.calls for pair in call]
    assert sorted(asked) == sorted(
        [("0", "text 1"), ("1", "text 2"), ("1", "text 3"), ("2", "text 5"), ("2", "text 7")]
    )
    if not overlap:
        assert len(recorder.calls) == 1


def test_what_arrives_during_a_call_is_scored_in_the_next_one() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    with GroupScorer(recorder.reward(), prompts(5), decode, overlap=True, num_samples=9) as scorer:
        scorer.add(0, group(1))
        while not recorder.calls:  # the first call is under way
            pass
        for index in range(1, 5):
            scorer.add(index, group(index, index))
        recorder.gate.set()
        scorer.results()
    assert [len(call) for call in recorder.calls] == [1, 8]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_failure_is_raised_and_stops_the_sampling(overlap: bool) -> None:
    def score(asked: Sequence[Prompt], *_: object) -> list[Score]:
        return [Score(problem="ValueError: no idea") for _ in asked]

    reward = Reward("broken", (), score, RewardConfig(on_error="stop"))
    with (
        pytest.raises(RewardError, match="'broken' failed.*no idea"),
        GroupScorer(
            reward, prompts(100_000), decode, overlap=overlap, num_samples=100_000
        ) as scorer,
    ):
        for index in range(100_000):
            scorer.add(index, group(1))
            if not overlap:
                break
        if overlap:
            pytest.fail("adding went on after a failure")
        scorer.results()


@pytest.mark.parametrize("overlap", [True, False])
def test_too_many_errors_stop_the_sampling_and_few_are_counted(overlap: bool) -> None:
    def score(asked: Sequence[Prompt], *_: object) -> list[Score]:
        return [Score(problem="odd") if int(one.key) % 2 else Score(1.0) for one in asked]

    for share, message in ((0.5, ""), (0.4, r"\d of 8 samples could not be scored.*sample \d")):
        reward = Reward("odd", (), score, RewardConfig(max_error_share=share))
        with GroupScorer(reward, prompts(4), decode, overlap=overlap, num_samples=8) as scorer:
            with pytest.warns(RuntimeWarning, match="'odd' failed on sample") as warned:
                try:
                    for index in range(4):
                        scorer.add(index, group(1, 1))
                    groups = scorer.results()
                except RewardError as error:
                    assert message and re.search(message, str(error))
                    continue
            assert not message and len(warned) == 1 and scorer.errors == 4
            assert [one.rewards for one in groups] == [[1.0, 1.0], [None, None]] * 2


def test_leaving_early_does_not_wait() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    with (
        pytest.raises(KeyboardInterrupt),
        GroupScorer(recorder.reward(), prompts(1), decode, overlap=True, num_samples=1) as scorer,
    ):
        scorer.add(0, group(1))
        raise KeyboardInterrupt
    recorder.gate.set()


class Sampled:
    """An engine whose completions are known: each of length 4, and one right, one wrong."""

    ranks = 1

    def generate(
        self, requests: Sequence[Any], *, on_group: Callable[..., None], **options: Any
    ) -> list[list[Completion]]:
        found = []
        for index, request in enumerate(requests):
            found.append([Completion((1,), (i,) * 4, (-1.0,) * 4, "stop", 1.0, 0) for i in (1, 0)])
            assert request.num_samples == 2
            on_group(index, found[-1])
        return found


def test_a_long_right_answer_is_penalised_and_positive(tmp_path: Path) -> None:
    cfg = replace(
        tiny_config(tmp_path, tmp_path),
        reward=RewardConfig(soft_overlong_tokens=4),
        rollout=RolloutConfig(max_new_tokens=6),
    )
    requests = [Request((1,), 2, temperature, 0) for temperature in (1.0, 1.2)]
    plan = RolloutPlan(0, prompts(1), prompts(1), 1.2, 0.5, requests, {})
    rollout = collect(
        Sampled(),
        Recorder().reward(),
        plan,
        decode,
        cfg,
        on_tokens=lambda _: None,
        lap=lambda _: None,
    )
    # Auxiliary ones are not penalised.
    assert [sample.reward for sample in rollout.samples] == [0.5, -0.5, 1.0, 0.0]
    assert rollout.main_rewards[:2].tolist() == [0.5, -0.5]
    assert [sample.task_reward for sample in rollout.samples] == [1.0, 0.0, 1.0, 0.0]
    assert [is_positive(sample, AepoConfig()) for sample in rollout.samples] == [True, False] * 2
    state = rollout.state_dict()
    assert Rollout.from_state(state, rollout.prompts) == rollout
    # The samples hold the task rewards; older checkpoints have them once more.
    assert "task_rewards" not in state
    older = {**state, "task_rewards": [1.0, 0.0, 1.0, 0.0]}
    assert Rollout.from_state(older, rollout.prompts) == rollout
