"""Samples what a step has planned and gets its rewards, in turn or one step ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import Config
from aepo_fast.report.phase import phase, progress
from aepo_fast.rewards.reward import Reward, soft_overlong_penalty
from aepo_fast.rollout.engine import RolloutEngine
from aepo_fast.rollout.scored import sample_and_score
from aepo_fast.samples import Rollout, RolloutPlan, Sample
from aepo_fast.world import ALONE, World


def collect(
    engine: RolloutEngine,
    reward: Reward,
    plan: RolloutPlan,
    decode: Callable[[Sequence[int]], str],
    cfg: Config,
    *,
    on_tokens: Callable[[int], None],
    lap: Callable[[str], None],
    world: World = ALONE,
) -> Rollout:
    """Sample all of a plan's prompts in one call and score them, see `sample_and_score`.

    `lap` is told when sampling ("rollout") and scoring ("reward") are done.
    """
    everyone = [*plan.prompts, *plan.aux_prompts]
    found = sample_and_score(
        engine,
        reward,
        everyone,
        plan.requests,
        decode,
        world=world,
        max_new_tokens=cfg.rollout.max_new_tokens,
        overlap=cfg.reward.overlap,
        on_tokens=on_tokens,
        lap=lap,
    )
    samples = []
    for index, (group, scores) in enumerate(zip(found.groups, found.scores, strict=True)):
        is_aux = index >= len(plan.prompts)
        for completion, value in zip(group, scores.rewards, strict=True):
            penalty = soft_overlong_penalty(
                len(completion.completion_ids),
                cfg.rollout.max_new_tokens,
                cfg.reward.soft_overlong_tokens,
            )
            samples.append(Sample(completion, index, is_aux, value, 0.0 if is_aux else penalty))
    lap("reward")
    return Rollout(
        samples=samples,
        prompts=everyone,
        texts=[text for group in found.scores for text in group.texts],
        num_main_groups=len(plan.prompts),
        reward_errors=found.errors,
        sampling_s=found.sampling_s,
    )


class _Stopped(Exception):
    """The run ends, and what is sampled ahead is not needed any more."""


class Rollouts:
    """Samples what each step plans.

    With rollout.steps_ahead = 1, what the next step plans is sampled in a thread while the policy
    trains, with the engine's own copy of the weights as they were before this step's updates.
    """

    def __init__(
        self,
        cfg: Config,
        engine: RolloutEngine,
        reward: Reward,
        decode: Callable[[Sequence[int]], str],
        check: Callable[[], None],
        world: World = ALONE,
    ) -> None:
        self.cfg, self.engine, self.reward, self.decode = cfg, engine, reward, decode
        self.check, self.world = check, world
        self._sampling_world = world.for_a_thread() if cfg.rollout.steps_ahead else world
        self._thread = ThreadPoolExecutor(1, "rollout")
        self._stop = threading.Event()
        self._ahead: tuple[RolloutPlan, Future[Rollout]] | None = None

    @property
    def planned(self) -> RolloutPlan | None:
        """The plan of what is sampled ahead, until `sample` has returned it."""
        return None if self._ahead is None else self._ahead[0]

    @phase("sampling")
    def sample(
        self, plan: RolloutPlan, on_tokens: Callable[[int], None], lap: Callable[[str], None]
    ) -> Rollout:
        """What a plan asks for, sampled ahead or now.

        Raises RolloutError, RewardError or Interrupted, those of sampling ahead only here.
        """
        self.world.together(self.check)
        if self._ahead is not None:
            assert plan is self.planned, "another plan than the one that was sampled ahead"
            rollout = self._ahead[1].result()
            self._ahead = None
            lap("rollout")
            lap("reward")
            return rollout
        rollout = self._collect(plan, lambda tokens: self._checked(on_tokens, tokens), lap)
        self.world.together(self.check)
        if not self.cfg.rollout.steps_ahead:
            self.engine.sleep()
        return rollout

    def start(self, plan: RolloutPlan) -> None:
        """Begin to sample a plan ahead of its step."""
        # Not ended by a signal: what it samples is part of what is saved then.
        self._ahead = plan, self._thread.submit(self._collect, plan, self._going, lambda _: None)

    def wait(self) -> None:
        """Until what was started is there, or has failed."""
        if self._ahead is not None:
            wait([self._ahead[1]])

    def close(self) -> None:
        """End what is still being sampled."""
        self._stop.set()
        self._thread.shutdown()

    def state_dict(self) -> dict[str, Any] | None:
        """What has been sampled ahead and with which plan; None where there is nothing."""
        if self._ahead is None or self._ahead[1].exception() is not None:
            return None
        plan, future = self._ahead
        return {
            "step": plan.step,
            "temperature": plan.temperature,
            "target": plan.target,
            "rollout": future.result().state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], plan: RolloutPlan) -> None:
        """Take over what was sampled ahead; raises ConfigError if `plan` has other prompts."""
        everyone = [*plan.prompts, *plan.aux_prompts]
        rollout = Rollout.from_state(state["rollout"], everyone)
        sampled = rollout.num_main_groups, 1 + max(sample.group for sample in rollout.samples)
        if sampled != (len(plan.prompts), len(everyone)):
            raise ConfigError(
                "trainer.prompts_per_step",
                len(plan.prompts),
                f"the checkpoint holds samples of {sampled[0]} prompts and "
                f"{sampled[1] - sampled[0]} auxiliary ones, drawn ahead",
                "Resume with its trainer.prompts_per_step and [aepo], then change them",
            )
        done: Future[Rollout] = Future()
        done.set_result(rollout)
        self._ahead = plan, done

    def _collect(
        self,
        plan: RolloutPlan,
        on_tokens: Callable[[int], None],
        lap: Callable[[str], None],
    ) -> Rollout:
        return collect(
            self.engine,
            self.reward,
            plan,
            self.decode,
            self.cfg,
            on_tokens=on_tokens,
            lap=lap,
            world=self._sampling_world,
        )

    def _checked(self, on_tokens: Callable[[int], None], tokens: int) -> None:
        self.check()
        on_tokens(tokens)

    def _going(self, tokens: int) -> None:
        progress()
        if self._stop.is_set():
            raise _Stopped
