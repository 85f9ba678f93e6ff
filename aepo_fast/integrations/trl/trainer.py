"""TRL's GRPOTrainer with AEPO's term in its loss and AEPO's controller around it.

A rollout is what TRL samples at once. T is chosen before it and holds for all its updates; the
controller takes in its entropy, measured before them, after the last one.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from aepo_fast.config.sections import TrainerConfig
from aepo_fast.integrations.trl.config import AEPOConfig
from aepo_fast.integrations.trl.head import ScoringModel, add_second_temperature
from aepo_fast.integrations.trl.measure import RolloutSums
from aepo_fast.integrations.trl.seams import check_trainer, check_trl
from aepo_fast.integrations.trl.term import (
    OLD_SECOND_LOGPROB,
    POSITIVE,
    PROMPT,
    Batching,
    aepo_term,
    loss_mask,
    token_weights,
)
from aepo_fast.method.controllers import make_controller
from aepo_fast.method.entropy_control import Measurement
from aepo_fast.method.forms import Clip, make_form
from aepo_fast.report.moving_mean import MovingMean

STATE_FILE = "aepo_state.json"

# AEPO's clip of token ratios where TRL's epsilons bound those of whole sequences.
_TOKEN_CLIP: Clip = (0.2, 0.2)
# Weights of reward functions are float32: a sum that should be 1 may lie this far below.
_ROUNDING = 1e-6


class AEPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer that holds the policy's entropy at args.aepo_entropy_target.

    Takes what GRPOTrainer takes; args is an AEPOConfig. Raises RuntimeError for a version of TRL
    that AEPO does not fit into.
    """

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: AEPOConfig | None = None, **others: Any
    ) -> None:
        if not isinstance(args, AEPOConfig):
            raise TypeError(
                f"args is a {type(args).__name__}: AEPOTrainer needs an AEPOConfig, which takes "
                "all that GRPOConfig takes"
            )
        check_trl()
        super().__init__(model, reward_funcs, args, **others)
        check_trainer(self)
        self.aepo, self.form = args.aepo, make_form(args.aepo)
        momentum_of = TrainerConfig(beta1=args.adam_beta1, epochs=args.updates_per_rollout)
        self.entropy_controller = make_controller(args.aepo, momentum_of)
        self.entropy_smoothed = MovingMean()
        self._sums = RolloutSums(self.accelerator.device)
        self._updates = 0
        self._positive = torch.zeros(0)  # of all ranks, [R], NaN where nothing gave a reward
        self._scored: list[tuple[Tensor, ScoringModel]] | None = None
        peft = hasattr(self.model, "get_base_model")
        add_second_temperature(self.model.get_base_model() if peft else self.model)
        self.add_callback(_AfterEachUpdate(self))

    def correct_samples(self, rewards_per_func: Tensor) -> Tensor:
        """1 for correct samples, 0 for others, NaN for those without a reward: [R].

        rewards_per_func: [R, F], NaN where a function gave none. A sample is correct if its reward,
        TRL's weighted sum, is aepo_reward_threshold or more. Override it where one of the functions
        decides.
        """
        weights = self.reward_weights.to(rewards_per_func.device)
        reward = (rewards_per_func * weights).nansum(1)
        correct = (reward >= self.aepo.reward_threshold - _ROUNDING).float()
        return correct.masked_fill(rewards_per_func.isnan().all(1), math.nan)

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._positive = self.correct_samples(rewards)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._scored = []
        batch = super()._generate_and_score_completions(inputs)
        scored, self._scored = self._scored, None

        count, rank = len(batch["completion_ids"]), self.accelerator.process_index
        index = torch.arange(rank * count, (rank + 1) * count, device=self._positive.device)
        groups = len(self._positive) // self.num_generations
        batch[PROMPT] = self._sums.add_prompts(groups) + index // self.num_generations
        batch[POSITIVE] = self._positive[index].nan_to_num(nan=0.0)
        self._log("aepo/positive_fraction", self._positive.nanmean().item())
        old = batch.get("old_per_token_logps")
        for logps, model in scored:
            if logps is old:  # not those of the reference
                length = batch["completion_ids"].size(1)
                second = model.completions("second_log_probs", length)
                if second is not None:
                    batch[OLD_SECOND_LOGPROB] = second
                self._measure(batch, model.completions("entropy", length))
        return batch

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **named: Any) -> Any:
        """TRL's, which AEPO listens to while it scores what was just sampled."""
        if self._scored is None or model is not self.model:
            return super()._get_per_token_logps_and_entropies(model, *args, **named)
        scoring = ScoringModel(model, self._second_temperature())
        found = super()._get_per_token_logps_and_entropies(scoring, *args, **named)
        self._scored.append((found[0], scoring))
        return found

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        scoring = ScoringModel(model, self._second_temperature())
        loss = super()._compute_loss(scoring, inputs)

        length = inputs["completion_ids"].size(1)
        logprob = scoring.completions("log_probs", length)
        entropy = scoring.completions("entropy", length)
        assert logprob is not None and entropy is not None
        if "old_per_token_logps" not in inputs:  # the policy is still the one that sampled
            self._measure(inputs, entropy)
        if not self.aepo.enabled:
            return loss
        term, rho = aepo_term(
            self.form,
            self.aepo,
            inputs,
            token_weights(inputs, self._batching),
            logprob=logprob,
            entropy=entropy,
            second_logprob=scoring.completions("second_log_probs", length),
            temperature=self.entropy_controller.temperature(),
            clip=self._clip,
        )
        if rho is not None:
            self._sums.add_rho(rho)
        return loss if term is None else loss + term

    def after_update(self) -> None:
        """Tell the controller of a rollout, after the last of its updates."""
        self._updates += 1
        if self._step % self.args.steps_per_rollout != 0:
            return
        controller, target = self.entropy_controller, self.aepo.entropy_target
        sums = self._sums.over_ranks(lambda part: self.accelerator.reduce(part, reduction="sum"))
        step = Measurement(sums.entropy, sums.stderr, controller.temperature(), self._updates)
        controller.update(step)
        metrics = {
            "aepo/entropy": step.entropy,
            "entropy_stderr": step.stderr,
            "entropy_smoothed": self.entropy_smoothed.update(step.entropy),
            "aepo/entropy_target": target,
            "aepo/temperature": step.temperature,
        }
        for name, value in (metrics | sums.metrics() | controller.metrics()).items():
            self._log(name, value)
        self._sums.clear()
        self._updates = 0

    def _measure(self, batch: Any, entropy: Tensor | None) -> None:
        assert entropy is not None
        self._sums.add_entropy(entropy, loss_mask(batch), batch[PROMPT], batch[POSITIVE])

    def _second_temperature(self) -> float | None:
        return self.form.second_temperature(self.entropy_controller.temperature())

    @property
    def _clip(self) -> Clip:
        whole_sequences = self.args.importance_sampling_level == "sequence"
        return _TOKEN_CLIP if whole_sequences else self.args.term_clip

    @property
    def _batching(self) -> Batching:
        return Batching(
            aggregation=self.args.aggregation,
            max_length=self.max_completion_length,
            accumulated=self.current_gradient_accumulation_steps,
            steps_per_generation=self.args.steps_per_generation,
            num_processes=self.accelerator.num_processes,
        )

    def _log(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if not self.args.should_save:
            return
        folder = Path(self._get_output_dir(trial=trial))
        folder /= f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        state = {
            "controller": self.entropy_controller.state_dict(),
            "smoothed": self.entropy_smoothed.values(),
        }
        (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE_FILE
        if not path.exists():
            warnings.warn(
                f"{path} does not exist: the checkpoint is of a trainer without AEPO, and the "
                "controller begins anew, with T = 1",
                stacklevel=2,
            )
            return
        state = json.loads(path.read_text(encoding="utf-8"))
        self.entropy_controller.load_state_dict(state["controller"])
        self.entropy_smoothed = MovingMean(state["smoothed"])


class _AfterEachUpdate(TrainerCallback):
    """Calls `after_update` before TRL logs and saves the step."""

    def __init__(self, trainer: AEPOTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """An optimizer step has been taken."""
        self.trainer.after_update()
