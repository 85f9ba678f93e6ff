"""Runs of AEPOTrainer on the tiny model that keep what each micro-batch was given and made."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaForCausalLM

from aepo_fast.integrations.trl import AEPOConfig, AEPOTrainer
from aepo_fast.integrations.trl.term import loss_mask
from aepo_fast.samples import Completion, Sample

PROMPTS = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(1, 5) for b in range(1, 5)])
TARGET = 6.0

# Rollouts of 16 samples: one update, two micro-batches an update, two updates, two passes of each,
# two rollouts an update.
WHOLE = dict(per_device_train_batch_size=16)
HALVES = dict(per_device_train_batch_size=8, gradient_accumulation_steps=2)
MINIBATCHES = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
MINIBATCHES |= dict(steps_per_generation=4)
PASSES = HALVES | dict(num_iterations=2)
TWO_ROLLOUTS = dict(per_device_train_batch_size=16, gradient_accumulation_steps=2)
TWO_ROLLOUTS |= dict(steps_per_generation=1)


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


def sharp_model(tiny: Path, folder: Path) -> Path:
    """The tiny model with larger logits: its entropies are about 4 nats, of 5.7 at most."""
    shutil.copytree(tiny, folder)
    model = LlamaForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(4)
    model.save_pretrained(folder)
    return folder


class Truth:
    """The policy of some weights in float64: log-probs of sampled tokens at any temperature."""

    def __init__(self, model: Path, weights: dict[str, Tensor]) -> None:
        self.model = LlamaForCausalLM.from_pretrained(model).double()
        self.model.load_state_dict({name: value.double() for name, value in weights.items()})

    def __call__(self, inputs: dict[str, Any], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, [B, C]."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        length = inputs["completion_ids"].size(1)
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1]
        logprob = torch.log_softmax(logits / temperature, -1)
        entropy = -(logprob.exp() * logprob).sum(-1)
        return logprob.gather(2, inputs["completion_ids"].unsqueeze(2)).squeeze(2), entropy


def samples_of(batch: MicroBatch) -> list[Sample]:
    """A micro-batch's samples as our trainer has them."""
    found = []
    mask = loss_mask(batch.inputs).bool()
    rows = zip(batch.inputs["completion_ids"], mask, batch.inputs["aepo_prompt"], strict=True)
    for ids, learns, prompt in rows:
        kept = tuple(ids[learns].tolist())
        completion = Completion((1,), kept, (0.0,) * len(kept), "stop", 1.0, 0)
        found.append(Sample(completion, int(prompt), False, float(kept[0] % 2 == 0)))
    return found
