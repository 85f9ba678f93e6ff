"""The rollouts of a run: planned, sampled and scored step by step, or one step ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import Config
from aepo_fast.data.sampler import PromptSampler
from aepo_fast.method.entropy_control import EntropyController, aepo_draws
from aepo_fast.method.forms import make_form
from aepo_fast.rewards.reward import Reward, soft_overlong_penalty
from aepo_fast.rewards.scorer import GroupScorer
from aepo_fast.rollout.engine import RolloutEngine
from aepo_fast.samples import Prompt, Rollout, RolloutPlan, Row


def collect(
    engine: RolloutEngine,
    reward: Reward,
    plan: RolloutPlan,
    decode: Callable[[Sequence[int]], str],
    cfg: Config,
    *,
    on_tokens: Callable[[int], None],
    lap: Callable[[str], None],
) -> Rollout:
    """Sample all of a plan's prompts in one call and score them, by choice meanwhile.

    `lap` is told when sampling ("rollout") and scoring ("reward") are done.
    """
    everyone = [*plan.prompts, *plan.aux_prompts]
    with GroupScorer(reward, everyone, decode, overlap=cfg.reward.overlap) as scorer:
        start = time.perf_counter()
        groups = engine.generate(
            plan.requests(cfg.trainer.group_size, cfg.trainer.seed),
            max_new_tokens=cfg.rollout.max_new_tokens,
            on_tokens=on_tokens,
            on_group=scorer.add,
        )
        sampling_s = time.perf_counter() - start
        lap("rollout")
        scored = scorer.results()
    rows = []
    for index, (group, scores) in enumerate(zip(groups, scored, strict=True)):
        is_aux = index >= len(plan.prompts)
        for completion, value in zip(group, scores.rewards, strict=True):
            penalty = soft_overlong_penalty(
                len(completion.completion_ids),
                cfg.rollout.max_new_tokens,
                cfg.reward.soft_overlong_tokens,
            )
            rows.append(Row(completion, index, is_aux, value, 0.0 if is_aux else penalty))
    lap("reward")
    return Rollout(
        rows=rows,
        prompts=everyone,
        texts=[text for group in scored for text in group.texts],
        num_main_groups=len(plan.prompts),
        reward_errors=scorer.errors,
        sampling_s=sampling_s,
    )


class _Stopped(Exception):
    """The run ends, and what is sampled ahead is not needed any more."""


class Rollouts:
    """Gives each step its rollout.

    With rollout.steps_ahead = 1, the next one is sampled in a thread while the policy trains, with
    the engine's own copy of the weights as they were before this step's updates, and with AEPO's
    temperature as it was then.
    """

    def __init__(
        self,
        cfg: Config,
        engine: RolloutEngine,
        reward: Reward,
        sampler: PromptSampler,
        controller: EntropyController,
        decode: Callable[[Sequence[int]], str],
        check: Callable[[], None],
    ) -> None:
        self.cfg, self.engine, self.reward = cfg, engine, reward
        self.sampler, self.controller, self.decode = sampler, controller, decode
        self.check = check
        self._thread = ThreadPoolExecutor(1, "rollout")
        self._stop = threading.Event()
        self._started: tuple[RolloutPlan, Future[Rollout]] | None = None
        self._ahead: tuple[RolloutPlan, Rollout] | None = None
        self._failure: BaseException | None = None

    def take(
        self, step: int, on_tokens: Callable[[int], None], lap: Callable[[str], None]
    ) -> tuple[RolloutPlan, Rollout]:
        """The rollout of a step; raises RolloutError, RewardError or Interrupted."""
        self.check()
        if self._failure is not None:
            raise self._failure
        if self._ahead is not None:
            (plan, rollout), self._ahead = self._ahead, None
            lap("rollout")
            lap("reward")
            return plan, rollout
        plan = self._plan(step)
        rollout = self._collect(plan, lambda tokens: self._checked(on_tokens, tokens), lap)
        self.check()
        if not self.cfg.rollout.steps_ahead:
            self.engine.sleep()
        return plan, rollout

    def start(self, step: int) -> None:
        """Begin to sample a step's rollout where the run works ahead and the step is part of it."""
        if self.cfg.rollout.steps_ahead and step < self.cfg.trainer.steps:
            plan = self._plan(step)
            # Not ended by a signal: what it samples is part of what is saved then.
            future = self._thread.submit(self._collect, plan, self._going, lambda _: None)
            self._started = plan, future

    def wait(self) -> None:
        """Until what was started is there; what it raised is raised by the next `take`."""
        if self._started is None:
            return
        (plan, future), self._started = self._started, None
        self._failure = future.exception()
        if self._failure is None:
            self._ahead = plan, future.result()
        else:
            self.sampler.load_state_dict(plan.sampler_state)

    def close(self) -> None:
        """End what is still being sampled."""
        self._stop.set()
        self._thread.shutdown()

    def state_dict(self) -> dict[str, Any]:
        """Where the prompts stand, and what has been sampled ahead."""
        if self._ahead is None:
            return {"sampler": self.sampler.state_dict(), "ahead": None}
        plan, rollout = self._ahead
        ahead = {
            "step": plan.step,
            "temperature": plan.temperature,
            "target": plan.target,
            "rollout": rollout.state_dict(),
        }
        return {"sampler": plan.sampler_state, "ahead": ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; raises ConfigError if the prompts are not the same."""
        self.sampler.load_state_dict(state["sampler"])
        ahead = state["ahead"]
        if ahead is not None:
            plan = self._plan(ahead["step"], ahead["temperature"], ahead["target"])
            everyone = [*plan.prompts, *plan.aux_prompts]
            rollout = Rollout.from_state(ahead["rollout"], everyone)
            sampled = rollout.num_main_groups, 1 + max(row.group for row in rollout.rows)
            if sampled != (len(plan.prompts), len(everyone)):
                raise ConfigError(
                    "trainer.prompts_per_step",
                    len(plan.prompts),
                    f"the checkpoint holds samples of {sampled[0]} prompts and "
                    f"{sampled[1] - sampled[0]} auxiliary ones, drawn ahead",
                    "Resume with its trainer.prompts_per_step and [aepo], then change them",
                )
            self._ahead = plan, rollout

    def _plan(
        self, step: int, temperature: float | None = None, target: float | None = None
    ) -> RolloutPlan:
        before = self.sampler.state_dict()
        prompts = self.sampler.next(self.cfg.trainer.prompts_per_step)
        return RolloutPlan(
            step=step,
            prompts=prompts,
            aux_prompts=self._auxiliary(step, prompts),
            temperature=self.controller.temperature() if temperature is None else temperature,
            target=self.cfg.aepo.entropy_target if target is None else target,
            sampler_state=before,
        )

    def _auxiliary(self, step: int, prompts: Sequence[Prompt]) -> list[Prompt]:
        aepo = self.cfg.aepo
        if not make_form(aepo).draws_auxiliary:
            return []
        # A stream of its own: drawing auxiliary prompts leaves the minibatches as GRPO has them.
        rng = np.random.default_rng([self.cfg.trainer.seed, step, 1])
        count = aepo_draws(len(prompts), aepo.alpha)
        return [prompts[index] for index in rng.choice(len(prompts), count, replace=False)]

    def _collect(
        self,
        plan: RolloutPlan,
        on_tokens: Callable[[int], None],
        lap: Callable[[str], None],
    ) -> Rollout:
        return collect(
            self.engine, self.reward, plan, self.decode, self.cfg, on_tokens=on_tokens, lap=lap
        )

    def _checked(self, on_tokens: Callable[[int], None], tokens: int) -> None:
        self.check()
        on_tokens(tokens)

    def _going(self, tokens: int) -> None:
        if self._stop.is_set():
            raise _Stopped
