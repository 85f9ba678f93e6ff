"""Optimizers by parameter group, the learning-rate schedules, and a guarded optimizer step."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import TrainerConfig
from aepo_fast.model.sharded import whole
from aepo_fast.report.unexpected import first_line
from aepo_fast.training.malloc import giving_memory_back

OF_TORCHAO = ("adamw_8bit", "adamw_bf16")


class HalfUpdateError(RuntimeError):
    """An error in the middle of an optimizer's step: some weights may be new, and some old."""


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
        self._rounded = dict(zip(self.masters, self.rounded, strict=True))
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
        for group in self.param_groups:
            for master in group["params"]:
                self._rounded[master].copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, and the copies."""
        return {**super().state_dict(), "masters": self.masters}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for master, saved in zip(self.masters, state_dict["masters"], strict=True):
            master.copy_(saved)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "masters"})


class MuonAndAdamW:
    """torch's Muon for matrices of layers, AdamW for embeddings, the head and vectors.

    Muon (https://kellerjordan.github.io/posts/muon) orthogonalises the momentum of a matrix; its
    steps are scaled to the size of AdamW's (arXiv 2502.16982), so that one learning rate fits both.
    """

    def __init__(
        self, matrices: Sequence[Tensor], others: torch.optim.AdamW, cfg: TrainerConfig
    ) -> None:
        self.muon = torch.optim.Muon(
            list(matrices),  # type: ignore[arg-type]
            lr=cfg.lr,
            weight_decay=cfg.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = others

    @property
    def _parts(self) -> dict[str, torch.optim.Optimizer]:
        return {"muon": self.muon, "adamw": self.adamw}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of both."""
        return [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self) -> None:
        """Take the step of both."""
        for part in self._parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients of both."""
        for part in self._parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Those of both, by name."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, part in self._parts.items():
            part.load_state_dict(state_dict[name])


def check_optimizer(cfg: TrainerConfig) -> None:
    """Raise ConfigError where an optimizer's package is not installed."""
    if cfg.optimizer in OF_TORCHAO and importlib.util.find_spec("torchao") is None:
        fix = "pip install 'aepo-fast[torchao]', or use \"adamw\""
        raise ConfigError("trainer.optimizer", cfg.optimizer, "torchao is not installed", fix)


def build_optimizer(
    model: nn.Module, cfg: TrainerConfig, *, compiles: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of a model's trained parameters, with weight decay on matrices only.

    "adamw" holds float32 copies of parameters of less than float32, see `MasterAdamW`. compiles:
    torchao's steps are compiled, which pays on a GPU; it takes a minute.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in trained if (p.ndim > 1) is many] for many in (True, False))
    if cfg.optimizer in OF_TORCHAO:
        return _torchao(_groups(matrices, vectors, cfg), cfg, compiles=compiles)
    if cfg.optimizer == "muon":
        ends = {id(p) for p in _ends(model)}
        inner = [p for p in matrices if p.ndim == 2 and id(p) not in ends]
        chosen = {id(p) for p in inner}
        rest = [p for p in matrices if id(p) not in chosen]
        made: Any = MuonAndAdamW(inner, _adamw(rest, vectors, cfg), cfg)
        return made
    return _adamw(matrices, vectors, cfg)


def _ends(model: nn.Module) -> Iterator[Tensor]:
    """The weights of a model's embedding and head."""
    for name in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, name, lambda: None)()
        if module is not None:
            yield module.weight


def _groups(
    matrices: Sequence[Tensor], vectors: Sequence[Tensor], cfg: TrainerConfig
) -> list[dict[str, Any]]:
    return [
        {"params": list(matrices), "weight_decay": cfg.weight_decay},
        {"params": list(vectors), "weight_decay": 0.0},
    ]


def _options(cfg: TrainerConfig) -> dict[str, Any]:
    return {"lr": cfg.lr, "betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps}


def _adamw(
    matrices: Sequence[Tensor], vectors: Sequence[Tensor], cfg: TrainerConfig
) -> torch.optim.AdamW:
    whole = all(p.dtype == torch.float32 for p in (*matrices, *vectors))
    kind = torch.optim.AdamW if whole else MasterAdamW
    return kind(_groups(matrices, vectors, cfg), **_options(cfg), fused=True)


def _torchao(groups: list[dict[str, Any]], cfg: TrainerConfig, *, compiles: bool) -> Any:
    from torchao.optim import AdamW8bit, _AdamW

    groups = [group for group in groups if group["params"]]
    kind: Any = {"adamw_8bit": AdamW8bit, "adamw_bf16": _AdamW}[cfg.optimizer]
    made = kind(groups, **_options(cfg), bf16_stochastic_round=True)
    if not compiles:
        eager = torch.compiler.set_stance("force_eager")(made.step)
        # Uncompiled, a step makes some 50 bytes for each number of a weight at a time.
        made.step = giving_memory_back()(eager)
    return made


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all groups of an optimizer a learning rate; torchao's have it in a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


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
    either way. Raises HalfUpdateError for an error of the optimizer's step.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = whole(nn.utils.clip_grad_norm_(trained, max_grad_norm)).item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        try:
            optimizer.step()
        except Exception as error:
            raise HalfUpdateError(f"{type(error).__name__}: {first_line(error)}") from error
    optimizer.zero_grad(set_to_none=True)
    return norm, finite
