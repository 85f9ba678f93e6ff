"""AdamW by parameter group, the learning-rate schedules, and a guarded optimizer step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from aepo_fast.config.sections import TrainerConfig


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 copies of parameters that are held in less.

    A step of lr 1e-6 is smaller than what bfloat16 can tell apart and would be lost. Gradients are
    added up in float32 as backward passes give them; after a step each parameter is its copy,
    rounded. The copies are part of the state.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        self.rounded = [p for group in groups for p in group["params"]]
        self.masters = [p.detach().float().clone() for p in self.rounded]
        self._master = dict(zip(self.rounded, self.masters, strict=True))
        groups = [
            {**group, "params": [self._master[p] for p in group["params"]]} for group in groups
        ]
        super().__init__(groups, **options)
        for parameter in self.rounded:
            parameter.register_post_accumulate_grad_hook(self._take_gradient)

    def _take_gradient(self, parameter: torch.Tensor) -> None:
        master, gradient = self._master[parameter], parameter.grad
        assert gradient is not None
        master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the copies and round them into the parameters, in place."""
        super().step(closure)
        for parameter, master in zip(self.rounded, self.masters, strict=True):
            parameter.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, and the copies."""
        return {**super().state_dict(), "masters": self.masters}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for master, saved in zip(self.masters, state_dict["masters"], strict=True):
            master.copy_(saved)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "masters"})


def build_optimizer(model: nn.Module, cfg: TrainerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; norms, biases and scales get none.

    Parameters of less than float32 get float32 copies, see `MasterAdamW`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    whole = all(p.dtype == torch.float32 for p in trained)
    kind = torch.optim.AdamW if whole else MasterAdamW
    return kind(
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
    optimizer: torch.optim.Optimizer, loss: float, *, max_grad_norm: float
) -> tuple[float, bool]:
    """Clip and apply the gradients, unless the loss or a gradient is not finite.

    Returns the gradient norm before clipping and whether the step was taken. Gradients are freed
    either way.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, max_grad_norm).item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite
