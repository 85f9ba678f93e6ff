"""The section of the trainer: steps, batch shape and optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aepo_fast.config.conditions import Needs, refuse_what_does_nothing, setting
from aepo_fast.config.errors import require, require_not_negative, require_positive

# Of the step after the warm-up the rate is still lr, in every schedule.
_LATER_STEPS = Needs(
    ("steps", "warmup_steps"),
    lambda steps, warmup_steps: steps > warmup_steps + 1,
    "set {0} above {1} + 1",
)


@dataclass(frozen=True)
class TrainerConfig:
    """Steps, batch shape and optimizer."""

    steps: int = 100  # training steps of the run
    prompts_per_step: int = 64  # prompts a step, without auxiliary ones
    group_size: int = 8  # samples per prompt
    minibatches: int = 1  # optimizer steps per pass over a rollout
    epochs: int = 1  # passes over a rollout
    # Most tokens, padding included, that the model takes at once; a longer sample goes alone.
    tokens_per_microbatch: int = 16384
    # How samples are laid out for the model: "packed" end to end (varlen attention), "shared" with
    # one copy of the prompt for all its samples (sdpa), "padded" with one line per sample.
    layout: Literal["auto", "packed", "shared", "padded"] = "auto"
    # "adamw" holds 8 bytes a parameter, 12 of bfloat16 weights, and "adamw_8bit" 2 (torchao).
    # "adamw_bf16" holds 4, of bfloat16 weights alone (torchao); it rounds them by chance, so that
    # small steps count on average, and "adamw_8bit" does so with theirs. "muon" takes
    # orthogonalised steps for the matrices of layers and AdamW's for all else.
    optimizer: Literal["adamw", "adamw_8bit", "adamw_bf16", "muon"] = "adamw"
    # What lies in pinned CPU memory; needs a GPU. "optimizer": the optimizer's state, which comes
    # to the GPU a part at a time for a step. "all": weights and gradients, too; layers come to the
    # GPU one after the other, and the processor takes the optimizer's step.
    offload: Literal["none", "optimizer", "all"] = "none"
    lr: float = 1e-6  # learning rate after the warm-up
    # Course of the rate after the warm-up: it stays, or falls towards 0 at the end of the run.
    lr_schedule: Literal["constant", "linear", "cosine"] = setting("constant", needs=_LATER_STEPS)
    warmup_steps: int = 0  # steps in which the rate rises linearly to lr
    weight_decay: float = 0.01  # weight decay, on matrices only
    # AdamW's momentum: the share that its mean of gradients keeps at an update. A long memory makes
    # the entropy follow its controller late.
    beta1: float = 0.9
    beta2: float = 0.999  # the same for AdamW's mean of squared gradients
    eps: float = 1e-8  # added to AdamW's denominator
    max_grad_norm: float = 1.0  # gradients of a larger norm are scaled down to it
    max_skipped_steps: int = 5  # non-finite steps in a row before the run stops
    seed: int = 0  # seed of sampling and of the order of prompts and minibatches
    device: Literal["auto", "cpu", "cuda"] = "auto"  # "auto" is the GPU where torch sees one
    # Of several processes: so many neighbours split each layer and the vocabulary among them, and
    # have the same micro-batches. For models of which one layer, or one sample, is too much.
    tensor_parallel: int = 1
    # Of several processes: how often all weights are there, each time in shards of some of them.
    # With one replica a machine, whole weights are gathered inside of machines alone.
    replicas: int = 1
    # Of several processes, how long one waits for the others before it gives up, seconds.
    timeout_s: float = 1800.0
    # A run is refused that `aepo-fast plan` says cannot fit the memory; false: it is tried.
    check_memory: bool = True

    def __post_init__(self) -> None:
        names = "steps prompts_per_step group_size minibatches epochs tokens_per_microbatch lr"
        names += " max_grad_norm max_skipped_steps eps timeout_s tensor_parallel replicas"
        require_positive("trainer", self, *names.split())
        require_not_negative("trainer", self, "warmup_steps", "weight_decay")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            reason = "is the share of its past that AdamW's average keeps"
            require(0 <= value < 1, f"trainer.{name}", value, reason, "Use [0, 1), e.g. 0.9")
        require(
            self.minibatches <= self.prompts_per_step,
            "trainer.minibatches",
            self.minibatches,
            f"more minibatches than the {self.prompts_per_step} prompts of a step",
            "Lower minibatches or raise prompts_per_step",
        )
        refuse_what_does_nothing("trainer", self)
