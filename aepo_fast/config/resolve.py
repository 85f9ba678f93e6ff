"""What "auto" stands for on this machine: the run's device, dtypes and head backend."""

from __future__ import annotations

import dataclasses

import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import Config
from aepo_kernels import multiplies_bfloat16, resolve_backend


def choose_dtypes(cfg: Config) -> Config:
    """The configuration with the dtype that each "auto" stands for on the run's device."""
    fast = multiplies_bfloat16(choose_device(cfg.trainer.device).type)
    auto = "bfloat16" if fast else "float32"
    model, rollout = cfg.model, cfg.rollout
    if model.compute_dtype == "auto":  # layers of bfloat16 weights compute in nothing else
        narrow = model.dtype == "bfloat16"
        model = dataclasses.replace(model, compute_dtype="bfloat16" if narrow else auto)
    if (model.dtype, model.compute_dtype) == ("bfloat16", "float32"):
        reason = "layers whose weights are held in bfloat16 compute in it"
        fix = 'Set model.dtype to "float32", or this to "bfloat16"'
        raise ConfigError("model.compute_dtype", "float32", reason, fix)
    if rollout.dtype == "auto":
        rollout = dataclasses.replace(rollout, dtype=auto)
    return dataclasses.replace(cfg, model=model, rollout=rollout)


def describe_dtypes(cfg: Config) -> str:
    """One line about a run's dtypes, and what a device without bfloat16 GEMMs makes of them."""
    names = cfg.model.dtype, cfg.model.compute_dtype, cfg.rollout.dtype
    line = "dtypes: weights {}, compute {}, rollouts {}".format(*names)
    if multiplies_bfloat16(choose_device(cfg.trainer.device).type):
        return line
    line += "; this processor has no bfloat16 instructions"
    return f"{line}: bfloat16 GEMMs are slow" if "bfloat16" in names else line


def choose_backend(cfg: Config) -> str:
    """The backend of the head's kernels; raises ConfigError where it cannot run."""
    device = choose_device(cfg.trainer.device)
    dtype = getattr(torch, cfg.model.compute_dtype)
    name = cfg.model.head_backend
    try:
        return resolve_backend(name, device.type, dtype)
    except ValueError as error:
        reason, fix = str(error).removeprefix(f"backend = {name!r}: ").split("; ", 1)
        raise ConfigError("model.head_backend", name, reason, fix.capitalize()) from error


def choose_device(requested: str) -> torch.device:
    """The device of the run; raises ConfigError for cuda without a GPU."""
    if requested == "cuda" and not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
        raise ConfigError("trainer.device", requested, reason, 'Use "cpu" or "auto"')
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(requested)
