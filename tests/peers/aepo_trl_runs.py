"""Runs of AEPOTrainer on the tiny model that keep what each micro-batch was given and made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from aepo_fast.integrations.trl import AEPOConfig, AEPOTrainer

PROMPTS = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(1, 5) for b in range(1, 5)])
TARGET = 6.0


def even_start(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """1 for completions whose first id is even."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def config(folder: Path, **settings: Any) -> AEPOConfig:
    """Rollouts of 4 prompts x 4 samples of up to 6 tokens, 4 updates, float32."""
    plain = dict(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        adam_beta1=0.5,
        max_grad_norm=0.0,
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=6,
        seed=1,
        aepo_controller="pi",
        aepo_entropy_target=TARGET,
    )
    return AEPOConfig(**(plain | settings))


@dataclass(frozen=True)
class MicroBatch:
    """One call of the loss in training.

    update: optimizer steps before it. step: micro-batches before it. inputs: TRL's batch. loss,
    grads: by parameter name, of this micro-batch. weights: those that it was computed with.
    """

    update: int
    step: int
    temperature: float
    inputs: dict[str, Any]
    accumulated: int
    loss: float
    grads: dict[str, Tensor]
    weights: dict[str, Tensor]


class RecordingTrainer(AEPOTrainer):
    """AEPOTrainer that keeps its micro-batches."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.micro_batches: list[MicroBatch] = []

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        loss = super()._compute_loss(model, inputs)
        named = self.model.named_parameters()
        parameters = {name: value for name, value in named if value.requires_grad}
        grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        self.micro_batches.append(
            MicroBatch(
                update=self.state.global_step,
                step=self._step,
                temperature=self.entropy_controller.temperature(),
                inputs={k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()},
                accumulated=self.current_gradient_accumulation_steps,
                loss=loss.item(),
                grads=dict(zip(parameters, grads, strict=True)),
                weights=weights,
            )
        )
        return loss


def run(
    model: Path, folder: Path, *, first_entropy: float | None = 5.7, **settings: Any
) -> RecordingTrainer:
    """A trained trainer. first_entropy: what its controller has measured before; None: nothing."""
    trainer = RecordingTrainer(
        str(model), even_start, config(folder, **settings), train_dataset=PROMPTS
    )
    trainer.entropy_controller.entropy = first_entropy
    trainer.train()
    return trainer


def logged(trainer: AEPOTrainer, name: str) -> list[float]:
    """A metric of every step that logged it."""
    return [line[name] for line in trainer.state.log_history if name in line]
