"""`aepo-fast doctor`: what this machine offers and why the rest does not work."""

from __future__ import annotations

from typing import get_args

import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine, auto_device
from aepo_fast.config.sections import Attention
from aepo_fast.model.load import choose_attention
from aepo_fast.model.packages import PACKAGES, PREFIX, cache_root, converted_folder
from aepo_fast.rewards import confinement
from aepo_fast.rollout.load import vllm_version
from aepo_fast.versions import TESTED
from aepo_kernels import doctor as kernels
from aepo_kernels.versions import installed_version

_ATTENTION: tuple[Attention, ...] = get_args(Attention)
_REQUIRED = ("transformers", "datasets", "reasoning-gym", "math-verify", "safetensors")
_OPTIONAL = ("flash-attn", "liger-kernel", "vllm", "tensorboard")


def report() -> str:
    """The whole report as text."""
    machine = _machine()
    lines = [kernels.report("aepo-fast")]
    lines += ["", "attention"]
    lines += [f"  {name}: {_attention_status(name, machine)}" for name in _ATTENTION]
    lines += ["", "verifiers of rewards", f"  {_confinement()}"]
    lines += ["", "packages"]
    lines += [f"  {name}: {_version(name, 'not installed')}" for name in _REQUIRED]
    lines += [f"  {name}: {_version(name, 'not installed (optional)')}" for name in _OPTIONAL]
    lines += ["", f"models from packages, converted in {cache_root()}"]
    for name in PACKAGES:
        ready = (converted_folder(PREFIX + name) / "config.json").is_file()
        lines.append(f"  {PREFIX}{name}: {'ready' if ready else 'fetched when first used'}")
    return "\n".join(lines)


def _confinement() -> str:
    if version := confinement.version():
        return f"their process can write no files (Landlock, version {version})"
    return "their process could write files: this system has no Landlock"


def _machine() -> Machine:
    """What a run in mixed precision would have here."""
    narrow = torch.bfloat16
    return Machine(auto_device(), torch.float32, narrow, narrow, head_backend="auto")


def _attention_status(name: Attention, machine: Machine) -> str:
    try:
        chosen = choose_attention(name, machine, "llama")
    except ConfigError as error:
        return error.reason
    return f"is {chosen} here" if name == "auto" else "works"


def _version(name: str, absent: str) -> str:
    # vLLM's CPU build has another name.
    found = (vllm_version() if name == "vllm" else installed_version(name)) or absent
    return f"{found} (tested: {' to '.join(TESTED[name])})" if name in TESTED else found
