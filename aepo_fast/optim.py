"""AdamW by parameter group, the learning-rate schedules, and a guarded optimizer step."""

from __future__ import annotations

import math

import torch
from torch import nn

from aepo_fast.config import TrainerConfig


def build_optimizer(model: nn.Module, cfg: TrainerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; norms, biases and scales get none."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": cfg.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=cfg.lr,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
        fused=True,
    )


def learning_rate(cfg: TrainerConfig, step: int) -> float:
    """Learning rate of a step counted from 0: linear warm-up, then the schedule down to 0."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.lr_schedule == "constant":
        return cfg.lr
    progress = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    if cfg.lr_schedule == "linear":
        return cfg.lr * (1 - progress)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * progress))


def guarded_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: float, *, max_grad_norm: float
) -> tuple[float, bool]:
    """Clip and apply the gradients, unless the loss or a gradient is not finite.

    Returns the gradient norm before clipping and whether the step was taken. Gradients are freed
    either way.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite
