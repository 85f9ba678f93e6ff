"""What a run of several processes cannot have."""

from __future__ import annotations

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import Config


def check_over_ranks(cfg: Config, said_by: str = "WORLD_SIZE") -> None:
    """Raise ConfigError for a setting that needs one process. said_by: what says there are more."""
    whole_weights = not cfg.model.lora.rank
    in_bfloat16 = cfg.model.dtype == "bfloat16" and whole_weights
    for key, value, refused, reason, fix in (
        (
            "model.liger",
            cfg.model.liger,
            cfg.model.liger,
            "a model is checked on the CPU before its weights are divided, without Liger",
            "Set it to false",
        ),
        (
            "model.quantization",
            cfg.model.quantization,
            cfg.model.quantization != "none",
            "4-bit weights are not divided among processes",
            'Set it to "none": each process holds only a part of the weights',
        ),
        (
            "model.router_aux_loss_coef",
            cfg.model.router_aux_loss_coef,
            cfg.model.router_aux_loss_coef > 0,
            "the loss that balances experts is one over the micro-batches of one process",
            "Leave it out, or set model.freeze_router = true",
        ),
        (
            "trainer.optimizer",
            cfg.trainer.optimizer,
            cfg.trainer.optimizer == "muon",
            "Muon's step needs whole matrices, and each process holds a part of them",
            'Use "adamw"',
        ),
        (
            "model.dtype",
            cfg.model.dtype,
            in_bfloat16 and cfg.trainer.optimizer == "adamw",
            "float32 copies are not made of bfloat16 weights that processes share",
            'Set it to "float32": weights are gathered in model.compute_dtype',
        ),
        (
            "trainer.offload",
            cfg.trainer.offload,
            cfg.trainer.offload == "optimizer",
            "moves the optimizer's state of one process",
            'Use "all" or "none"',
        ),
        (
            "rollout.offload_optimizer",
            cfg.rollout.offload_optimizer,
            cfg.rollout.offload_optimizer,
            "moves the optimizer's state of one process",
            "Set it to false",
        ),
    ):
        if refused:
            raise ConfigError(key, value, f"{reason}, and {said_by} says there are several", fix)


def check_parts(
    cfg: Config, size: int, head_backend: str, fix: str = "Start as many with torchrun"
) -> None:
    """Raise ConfigError where `size` processes cannot be parted as a configuration says.

    head_backend: the one that runs. fix: what gives another number of them.
    """
    split, replicas = cfg.trainer.tensor_parallel, cfg.trainer.replicas
    for key, value, each in (
        ("trainer.tensor_parallel", split, split),
        ("trainer.replicas", replicas, split * replicas),
        ("rollout.tensor_parallel", cfg.rollout.tensor_parallel, cfg.rollout.tensor_parallel),
    ):
        if value > 1 and size % each:
            reason = f"{size} processes are no multiple of {each}"
            if each > value:
                reason += f", with trainer.tensor_parallel = {split}"
            raise ConfigError(key, value, reason, f"{fix}, or set it to 1")
    if split == 1:
        return
    for key, value, refused, step in (
        ("model.lora.rank", cfg.model.lora.rank, cfg.model.lora.rank > 0, "Set it to 0"),
        ("trainer.offload", cfg.trainer.offload, cfg.trainer.offload != "none", 'Use "none"'),
        ("model.head_backend", head_backend, head_backend != "chunked", 'Use "chunked"'),
        ("rollout.top_k", cfg.rollout.top_k, cfg.rollout.top_k > 0, "Set it to 0"),
    ):
        if refused:
            reason = f"does not go together with trainer.tensor_parallel = {split}"
            raise ConfigError(key, value, reason, f"{step}, or trainer.tensor_parallel to 1")
