"""The training step: AEPO as its papers state it, over the parts that do the work.

`Trainer.step` reads as the algorithm of arXiv 2510.08141. Its resampling form draws auxiliary rows;
the other forms draw none and differ only in the objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aepo_fast.config.sections import Config
from aepo_fast.data.sampler import make_sampler
from aepo_fast.method.aepo_terms import dcpo_mix
from aepo_fast.method.controllers import BonusCoefficient, RivalController, make_controller
from aepo_fast.method.credit import group_advantages, plan_minibatches
from aepo_fast.method.entropy_control import Measurement
from aepo_fast.method.objective import (
    build_objective,
    is_positive,
    needs_scores,
    second_temperature,
)
from aepo_fast.method.tokens import StepContext
from aepo_fast.report.moving_mean import MovingMean
from aepo_fast.rewards.reward import RewardError
from aepo_fast.rollout.canary import Canary
from aepo_fast.rollout.sampling import Rollouts
from aepo_fast.samples import Rollout, Row, seed_of, token_mean
from aepo_fast.training.assemble import Inputs, load_models
from aepo_fast.training.checkpoint import load_optimizer, rng_state, set_rng_state
from aepo_fast.training.entropy_metrics import entropy_metrics
from aepo_fast.training.interrupt import InterruptGuard
from aepo_fast.training.optim import build_optimizer, learning_rate
from aepo_fast.training.step_metrics import (
    StepTimes,
    perf_metrics,
    rollout_metrics,
    sampling_metrics,
    update_metrics,
)
from aepo_fast.training.update import UpdateResult, update

_CANARY_PROMPTS = 4


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class StepResult:
    """What a step leaves for the log."""

    metrics: dict[str, Any]
    rollout: Rollout
    advantages: torch.Tensor


class Trainer:
    """The state of a run and its one operation, `step`."""

    def __init__(self, cfg: Config, inputs: Inputs, guard: InterruptGuard) -> None:
        self.cfg, self.inputs, self.guard = cfg, inputs, guard
        models = load_models(cfg, inputs)
        self.model, self.policy = models.model, models.policy
        self.reference, self.engine = models.reference, models.engine
        self.optimizer = build_optimizer(self.model, cfg.trainer)
        self.controller = make_controller(cfg.aepo, cfg.trainer)
        self.rollouts = Rollouts(
            cfg,
            self.engine,
            inputs.reward,
            make_sampler(cfg, inputs.prompts),
            self.controller,
            inputs.decode,
            guard.check,
        )
        self.bonus = BonusCoefficient(cfg.loss)
        self.rival = RivalController(cfg.loss)
        self.smoothed = MovingMean()
        self.steps_done = self.updates = self.skipped_in_a_row = 0
        if inputs.checkpoint is not None and inputs.state is not None:
            load_optimizer(inputs.checkpoint, self.optimizer)
            self._load_state(inputs.state)
        self.canary = None
        if self.engine.verify:  # measured before the first sync, on weights from the same files
            some = [prompt.token_ids for prompt in inputs.prompts.train[:_CANARY_PROMPTS]]
            limit = cfg.rollout.max_new_tokens
            self.canary = Canary(self.engine, self.policy, some, max_new_tokens=limit)
        self._sync_weights()
        self.resume_state = self._state()

    def step(self, on_tokens: Callable[[int], None]) -> StepResult:
        """Sample, score, update the policy, then the entropy controller.

        Raises Interrupted only while the weights are still those of `resume_state`, and
        TrainingError after too many updates in a row without a finite gradient.
        """
        cfg, times, check = self.cfg.trainer, StepTimes(), self.guard.check
        rng = np.random.default_rng([cfg.seed, self.steps_done])
        plan, rollout = self.rollouts.take(self.steps_done, on_tokens, times.lap)
        self.rollouts.start(self.steps_done + 1)

        rows = rollout.rows
        advantages = group_advantages(
            rollout.main_rewards, rollout.groups, str(self.cfg.loss.advantage)
        )
        groups, positives = self._trained(rollout)
        main = [index for group in groups for index in group]
        trained = main + positives
        scores = reference = None
        if needs_scores(self.cfg.loss, cfg.minibatches * cfg.epochs):
            second = second_temperature(self.cfg.loss, self.cfg.aepo, plan.temperature)
            scores = self.policy.score(rows, trained, second_temperature=second, check=check)
        if self.reference is not None:
            reference = self.reference.score(rows, trained, check=check)
        times.lap("score")

        context = self._context(rollout, plan.temperature)
        generator = torch.Generator().manual_seed(seed_of(cfg.seed, self.steps_done, 1))
        results: list[UpdateResult] = []
        for _ in range(cfg.epochs):
            for minibatch in plan_minibatches(
                groups, positives, num_minibatches=cfg.minibatches, rng=rng
            ):
                objective = build_objective(
                    self.cfg,
                    rows,
                    advantages,
                    minibatch,
                    context,
                    scores=scores,
                    reference=reference,
                    generator=generator,
                )
                self._set_learning_rate()
                result = update(
                    self.policy,
                    self.optimizer,
                    rows,
                    minibatch,
                    objective,
                    max_grad_norm=cfg.max_grad_norm,
                    # Once the weights have moved, the step is finished before stopping.
                    check=check if not results else lambda: None,
                )
                self._count(result)
                results.append(result)
        metrics = update_metrics(results)
        # Of the policy that sampled. Without scores there was one update, which measured it.
        before = results[0] if scores is None else scores
        metrics |= sampling_metrics(before.logprob, rows, main, self.resume_state["updates"])
        entropy = token_mean(before.entropy, rows, main)
        metrics["entropy"], metrics["entropy_stderr"] = entropy
        threshold, decode = self.cfg.aepo.reward_threshold, self.inputs.decode
        metrics |= entropy_metrics(rollout, before.entropy, main, threshold, decode)
        times.lap("train")

        self.rollouts.wait()
        times.lap("wait")
        updates = sum(result.taken for result in results)
        self.controller.update(Measurement(*entropy, plan.temperature, updates))
        self.bonus.update(metrics["entropy"])
        self.rival.update(metrics["entropy"])
        metrics["entropy_smoothed"] = self.smoothed.update(metrics["entropy"])
        difference = self._sync_weights()
        times.lap("sync")
        self.steps_done += 1
        self.resume_state = self._state()
        metrics |= {
            "aepo/entropy_target": plan.target,
            "aepo/temperature": plan.temperature,
            **self.controller.metrics(),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "weights_version": self.updates,
        }
        if difference is not None:
            metrics["sampling/canary_difference"] = difference
        metrics |= rollout_metrics(rollout, threshold)
        metrics |= self.engine.metrics
        metrics |= times.metrics() | perf_metrics(rollout, results, times)
        return StepResult(metrics, rollout, advantages)

    def close(self) -> None:
        """End what is still being sampled, and the rollout engine."""
        self.rollouts.close()
        self.engine.close()

    @property
    def unchanged(self) -> bool:
        """Whether the weights are still those of `resume_state`."""
        return self.updates == self.resume_state["updates"]

    def _sync_weights(self) -> float | None:
        """Hand the weights to the rollout engine; the canary's difference where there is one."""
        self.engine.sync_weights(self.model, self.updates)
        return None if self.canary is None else self.canary.check()

    def _context(self, rollout: Rollout, temperature: float) -> StepContext:
        aepo = self.cfg.aepo
        main = [row for row in rollout.rows if not row.is_aux]
        aux = [row for row in rollout.rows if row.is_aux]
        share = sum(is_positive(row, aepo) for row in main) / len(main)
        return StepContext(
            temperature=temperature,
            bonus_coef=self.bonus.value,
            dcpo_mix=dcpo_mix(self._entropy_error(), share, len(main)),
            aux_draws=len(aux),
            aux_positives=sum(is_positive(row, aepo) for row in aux),
            num_minibatches=self.cfg.trainer.minibatches,
            entropy=self.controller.entropy or 0.0,
            lever=self.rival.value,
        )

    def _entropy_error(self) -> float:
        entropy = self.controller.entropy
        return 0.0 if entropy is None else self.cfg.aepo.entropy_target - entropy

    def _trained(self, rollout: Rollout) -> tuple[list[list[int]], list[int]]:
        """Rows to learn from: the scored ones of each main group, and the auxiliary positives."""

        def scored(row: Row) -> bool:
            return row.reward is not None and row.length > 0

        groups = [
            [index for index in group if scored(rollout.rows[index])]
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
            for index, row in enumerate(rollout.rows)
            if row.is_aux and is_positive(row, self.cfg.aepo)
        ]
        return groups, positives

    def _set_learning_rate(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg.trainer, self.steps_done)

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
        return {
            "model_path": self.cfg.model.path,
            "steps_done": self.steps_done,
            "updates": self.updates,
            "skipped_in_a_row": self.skipped_in_a_row,
            "rollouts": self.rollouts.state_dict(),
            "controller": self.controller.state_dict(),
            "bonus": self.bonus.state_dict(),
            "rival": self.rival.state_dict(),
            "smoothed": self.smoothed.values(),
            "rng": rng_state(),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self.steps_done, self.updates = state["steps_done"], state["updates"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.rollouts.load_state_dict(state["rollouts"])
        self.controller.load_state_dict(state["controller"])
        self.bonus.load_state_dict(state["bonus"])
        if "rival" in state:  # not in checkpoints from before these methods
            self.rival.load_state_dict(state["rival"])
        self.smoothed = MovingMean(state.get("smoothed", ()))  # older checkpoints have none
        set_rng_state(state["rng"])
