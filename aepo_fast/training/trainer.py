"""The training step: AEPO as its papers state it, over the parts that do the work.

`Trainer.step` reads as the algorithm of arXiv 2510.08141. Its resampling form draws auxiliary
samples; the other forms draw none and differ only in the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import Config
from aepo_fast.data.sampler import make_sampler
from aepo_fast.method.aepo_terms import dcpo_mix
from aepo_fast.method.controllers import BonusCoefficient, RivalController, make_controller
from aepo_fast.method.credit import group_advantages, plan_minibatches
from aepo_fast.method.entropy_control import Measurement
from aepo_fast.method.objective import (
    Objective,
    build_objective,
    is_positive,
    needs_old_logprobs,
    second_temperature,
)
from aepo_fast.method.tokens import StepContext
from aepo_fast.report.moving_mean import MovingMean
from aepo_fast.report.phase import phase, progress
from aepo_fast.rewards.reward import RewardError
from aepo_fast.rollout.canary import Canary
from aepo_fast.rollout.sampling import Rollouts
from aepo_fast.samples import Rollout, RolloutPlan, Sample, TokenValues, seed_of, token_mean
from aepo_fast.training.assemble import Inputs, load_models
from aepo_fast.training.checkpoint import rng_state, set_rng_state
from aepo_fast.training.interrupt import InterruptGuard
from aepo_fast.training.offload import OffloadedOptimizer, offloaded
from aepo_fast.training.optim import build_optimizer, learning_rate, set_learning_rate
from aepo_fast.training.optimizer_state import load_optimizer
from aepo_fast.training.plan import plan_rollout
from aepo_fast.training.step_metrics import StepResult, StepTimes, step_metrics
from aepo_fast.training.update import UpdateResult, update

_CANARY_PROMPTS = 4


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class Trainer:
    """The state of a run and its one operation, `step`."""

    def __init__(
        self, cfg: Config, machine: Machine, inputs: Inputs, guard: InterruptGuard
    ) -> None:
        self.cfg, self.inputs, self.guard, world = cfg, inputs, guard, machine.world
        models = load_models(cfg, machine, inputs)
        self.model, self.policy = models.model, models.policy
        self.reference, self.engine = models.reference, models.engine
        offload = cfg.trainer.offload
        compiles = machine.is_gpu and offload != "all"
        self.optimizer = build_optimizer(self.model, cfg.trainer, compiles=compiles)
        self.parked: list[OffloadedOptimizer] = []  # parts of the optimizer, between updates
        if offload == "optimizer" or cfg.rollout.offload_optimizer:
            self.optimizer, parts = offloaded(self.optimizer)
            for part in parts:
                part.to_cpu()
            self.parked = parts if cfg.rollout.offload_optimizer else []
        self.controller = make_controller(cfg.aepo, cfg.trainer)
        self.sampler = make_sampler(cfg, inputs.prompts)
        self.rollouts = Rollouts(cfg, self.engine, inputs.reward, inputs.decode, guard.check, world)
        self.check = partial(world.together, guard.check)  # all stop where one was asked to
        self.bonus = BonusCoefficient(cfg.loss)
        self.rival = RivalController(cfg.loss)
        self.smoothed, self.clock = MovingMean(), StepTimes()
        self.steps_done = self.updates = self.skipped_in_a_row = 0
        if inputs.checkpoint is not None and inputs.state is not None:
            load_optimizer(inputs.checkpoint, self.optimizer, world)
            self._load_state(inputs.state)
        self.canary = None
        if self.engine.verify:  # measured before the first sync, on weights from the same files
            some = [prompt.token_ids for prompt in inputs.prompts.train[:_CANARY_PROMPTS]]
            of_run: Any = {"max_new_tokens": cfg.rollout.max_new_tokens, "kept": cfg.rollout.kept}
            self.canary = Canary(self.engine, self.policy, some, **of_run)
        self._sync_weights()
        self.resume_state = self._state()

    def step(self, on_tokens: Callable[[int], None]) -> StepResult:
        """Sample, learn from the samples, measure the entropy, and let the controller act on it.

        Raises Interrupted only while the weights are still those of `resume_state`, and
        TrainingError after too many updates in a row without a finite gradient.
        """
        cfg, self.clock = self.cfg, StepTimes()
        # T from the controller, prompts, auxiliary prompts and requests; where samples are drawn
        # ahead, the step before has made them.
        plan = self.rollouts.planned or self._plan(self.steps_done)
        with self.clock.memory_around("sample"):  # one call, and the rewards
            rollout = self.rollouts.sample(plan, on_tokens, self.clock.lap)
            self._sample_ahead()

        samples, kind = rollout.samples, cfg.loss.advantage
        advantages = group_advantages(rollout.main_rewards, rollout.groups, kind)
        groups, positives = self._learnable(rollout)
        main = [index for group in groups for index in group]
        old, reference = self._old_logprobs(samples, main + positives, plan.temperature)

        updates: list[UpdateResult] = []
        context, generator = self._context(rollout, plan.temperature), self._generator()
        known: dict[str, Any] = {"old": old, "reference": reference, "generator": generator}
        with self._optimizer_on_device(), self.clock.memory_around("train"):
            for minibatch in self._minibatches(groups, positives):
                loss = build_objective(cfg, samples, advantages, minibatch, context, **known)
                updates.append(self._update(samples, minibatch, loss, first=not updates))
        # Of the policy that sampled. Without a pass before it, the one update measured it.
        before = updates[0].before if old is None else old
        entropy, stderr = token_mean(before.entropy, samples, main)

        self._wait_for_samples_ahead()
        taken = sum(one.taken for one in updates)
        measured = Measurement(entropy, stderr, plan.temperature, taken)
        self.controller.update(measured)
        self.bonus.update(entropy)
        self.rival.update(entropy)
        smoothed = self.smoothed.update(entropy)
        difference = self._sync_weights()
        self.steps_done += 1
        self.resume_state = self._state()
        return StepResult(
            plan=plan,
            rollout=rollout,
            advantages=advantages,
            main=main,
            before=before,
            updates=updates,
            measured=measured,
            entropy_smoothed=smoothed,
            canary_difference=difference,
            times=self.clock,
        )

    def metrics(self, result: StepResult) -> dict[str, float]:
        """All metrics of the step that was just done, in the order of metrics.jsonl."""
        return step_metrics(
            result,
            controller=self.controller.metrics(),
            engine=self.engine.metrics,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            weights_version=self.updates,
            threshold=self.cfg.aepo.reward_threshold,
            decode=self.inputs.decode,
        )

    def close(self) -> None:
        """End what is still being sampled, and the rollout engine."""
        self.rollouts.close()
        self.engine.close()

    @property
    def unchanged(self) -> bool:
        """Whether the weights are still those of `resume_state`."""
        return self.updates == self.resume_state["updates"]

    @contextmanager
    def _optimizer_on_device(self) -> Iterator[None]:
        """Bring the optimizer's state from where it waits between updates, and back."""
        for part in self.parked:
            part.to_device()
        yield
        for part in self.parked:
            part.to_cpu()
        self.clock.lap("train")

    @phase("weights to the sampler")
    def _sync_weights(self) -> float | None:
        """Hand the weights to the rollout engine; the canary's difference where there is one."""
        world, sync = self.policy.machine.world, self.engine.sync_weights
        world.together(partial(sync, self.model, self.updates))
        difference = None if self.canary is None else self.canary.check()
        self.clock.lap("sync")
        return difference

    def _plan(self, step: int) -> RolloutPlan:
        temperature, target = self.controller.temperature(), self.cfg.aepo.entropy_target
        return plan_rollout(self.cfg, step, self.sampler, temperature=temperature, target=target)

    def _sample_ahead(self) -> None:
        """Begin with the next step's samples where the run works ahead and has a next step."""
        step = self.steps_done + 1
        if self.cfg.rollout.steps_ahead and step < self.cfg.trainer.steps:
            self.rollouts.start(self._plan(step))

    @phase("waiting for samples drawn ahead")
    def _wait_for_samples_ahead(self) -> None:
        self.rollouts.wait()
        self.clock.lap("wait")

    @phase("log-probs before the updates")
    def _old_logprobs(
        self, samples: Sequence[Sample], indices: Sequence[int], temperature: float
    ) -> tuple[TokenValues | None, TokenValues | None]:
        """Log-probs and entropies before the updates, of the policy and of its reference.

        None for the policy where a single update measures them, and without a reference.
        """
        cfg, check = self.cfg, self.check
        old = reference = None
        if needs_old_logprobs(cfg.loss, cfg.trainer.minibatches * cfg.trainer.epochs):
            second = second_temperature(cfg.loss, cfg.aepo, temperature)
            old = self.policy.token_values(samples, indices, second_temperature=second, check=check)
        if self.reference is not None:
            reference = self.reference.token_values(samples, indices, check=check)
        self.clock.lap("score")
        return old, reference

    def _generator(self) -> torch.Generator:
        """The step's random stream for losses that choose tokens by chance."""
        seed = seed_of(self.cfg.trainer.seed, self.steps_done, 1)
        return torch.Generator().manual_seed(seed)

    def _minibatches(self, groups: list[list[int]], positives: list[int]) -> list[list[int]]:
        """Indices of samples of each update of the step, epoch after epoch."""
        cfg = self.cfg.trainer
        rng = np.random.default_rng([cfg.seed, self.steps_done])
        return [
            minibatch
            for _ in range(cfg.epochs)
            for minibatch in plan_minibatches(
                groups, positives, num_minibatches=cfg.minibatches, rng=rng
            )
        ]

    @phase("an update")
    def _update(
        self,
        samples: Sequence[Sample],
        minibatch: Sequence[int],
        objective: Objective,
        *,
        first: bool,
    ) -> UpdateResult:
        set_learning_rate(self.optimizer, learning_rate(self.cfg.trainer, self.steps_done))
        result = update(
            self.policy,
            self.optimizer,
            samples,
            minibatch,
            objective,
            max_grad_norm=self.cfg.trainer.max_grad_norm,
            # Once the weights have moved, the step is finished before stopping.
            check=self.check if first else progress,
        )
        self._count(result)
        self.clock.lap("train")
        return result

    def _context(self, rollout: Rollout, temperature: float) -> StepContext:
        aepo = self.cfg.aepo
        main = [sample for sample in rollout.samples if not sample.is_aux]
        aux = [sample for sample in rollout.samples if sample.is_aux]
        share = sum(is_positive(sample, aepo) for sample in main) / len(main)
        return StepContext(
            temperature=temperature,
            bonus_coef=self.bonus.value,
            dcpo_mix=dcpo_mix(self._entropy_error(), share, len(main)),
            aux_draws=len(aux),
            aux_positives=sum(is_positive(sample, aepo) for sample in aux),
            num_minibatches=self.cfg.trainer.minibatches,
            lever=self.rival.value,
        )

    def _entropy_error(self) -> float:
        entropy = self.controller.entropy
        return 0.0 if entropy is None else self.cfg.aepo.entropy_target - entropy

    def _learnable(self, rollout: Rollout) -> tuple[list[list[int]], list[int]]:
        """Indices to learn from: main samples with a reward, by group, and auxiliary positives."""

        def has_reward(sample: Sample) -> bool:
            return sample.reward is not None and sample.length > 0

        groups = [
            [index for index in group if has_reward(rollout.samples[index])]
            for group in rollout.main_groups
        ]
        if not any(groups):
            raise RewardError(
                f"reward.function = {self.inputs.reward.name!r}: no completion of step "
                f"{self.steps_done + 1} got a reward, so there is nothing to learn from. Look at "
                "the errors reported above"
            )
        positives = [
            index
            for index, sample in enumerate(rollout.samples)
            if sample.is_aux and is_positive(sample, self.cfg.aepo)
        ]
        return groups, positives

    def _count(self, result: UpdateResult) -> None:
        if result.taken:
            self.updates += 1
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.cfg.trainer.max_skipped_steps:
            raise TrainingError(
                f"trainer.max_skipped_steps = {self.cfg.trainer.max_skipped_steps}: so many "
                f"updates in a row had a loss ({result.loss}) or gradient norm "
                f"({result.grad_norm}) that is not finite. The last checkpoint is from before "
                "them: lower trainer.lr, or look at rollouts.jsonl, and go on with --resume"
            )

    def _state(self) -> dict[str, Any]:
        ahead = self.rollouts.planned  # a resumed run draws its prompts again
        sampler = self.sampler.state_dict() if ahead is None else ahead.sampler_state
        return {
            "model_path": self.cfg.model.origin,
            "optimizer": self.cfg.trainer.optimizer,
            "rendered_at": self.inputs.rendered_at.isoformat(),
            "steps_done": self.steps_done,
            "updates": self.updates,
            "skipped_in_a_row": self.skipped_in_a_row,
            "rollouts": {"sampler": sampler, "ahead": self.rollouts.state_dict()},
            "controller": self.controller.state_dict(),
            "bonus": self.bonus.state_dict(),
            "rival": self.rival.state_dict(),
            "smoothed": self.smoothed.values(),
            "rng": rng_state(with_gpu=self.policy.machine.is_gpu),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self.steps_done, self.updates = state["steps_done"], state["updates"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.sampler.load_state_dict(state["rollouts"]["sampler"])
        ahead = state["rollouts"]["ahead"]
        if ahead is not None:
            known = {name: ahead[name] for name in ("temperature", "target")}
            plan = plan_rollout(self.cfg, ahead["step"], self.sampler, **known)
            self.rollouts.load_state_dict(ahead, plan)
        self.controller.load_state_dict(state["controller"])
        self.bonus.load_state_dict(state["bonus"])
        if "rival" in state:  # not in checkpoints from before these methods
            self.rival.load_state_dict(state["rival"])
        self.smoothed = MovingMean(state.get("smoothed", ()))  # older checkpoints have none
        set_rng_state(state["rng"], rank=self.policy.machine.world.rank)
