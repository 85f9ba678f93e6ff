"""What a run computes with on this machine: its device, its dtypes and its head backend."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.over_ranks import check_over_ranks, check_parts
from aepo_fast.config.sections import Config
from aepo_fast.world import ALONE, World, is_started_with_others, join
from aepo_kernels import multiplies_bfloat16, resolve_backend
from aepo_kernels.cpu import unavailable_reason

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Machine:
    """What a run computes with, decided once by `resolve_machine`.

    weights_dtype: of the trained weights. compute_dtype: of the GEMMs. rollout_dtype: of the
    weights that sample. head_backend: of the head's kernels. world: the processes of the run.
    tensor_parallel: neighbours among them that split each layer. data: one of each such group; they
    share the micro-batches. replicas: how often all weights are there.
    """

    device: torch.device
    weights_dtype: torch.dtype
    compute_dtype: torch.dtype
    rollout_dtype: torch.dtype
    head_backend: str
    world: World = ALONE
    data: World = ALONE
    tensor_parallel: int = 1
    replicas: int = 1

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU; it is a CPU otherwise."""
        return self.device.type == "cuda"

    @property
    def runs_cpp(self) -> bool:
        """Whether layers and sampling run in our C++: on a CPU, where the library can be had."""
        return not self.is_gpu and unavailable_reason() is None

    @property
    def vllm_on_gpu(self) -> bool:
        """Whether vLLM samples on a GPU: it takes one where torch sees it, whatever `device` is."""
        return auto_device().type == "cuda"

    def autocast(self) -> torch.autocast:
        """The context in which a model's GEMMs compute in compute_dtype."""
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, self.compute_dtype, enabled=enabled)

    def only_sampling(self) -> Machine:
        """The same for a model that nothing trains: its weights are held in rollout_dtype."""
        dtype = self.rollout_dtype
        return dataclasses.replace(self, weights_dtype=dtype, compute_dtype=dtype)

    def settled(self, cfg: Config) -> Config:
        """The configuration with the dtype that each "auto" stands for."""
        model = dataclasses.replace(cfg.model, compute_dtype=dtype_name(self.compute_dtype))
        rollout = dataclasses.replace(cfg.rollout, dtype=dtype_name(self.rollout_dtype))
        return dataclasses.replace(cfg, model=model, rollout=rollout)

    def describe(self) -> str:
        """One line about the dtypes, and what a device without bfloat16 GEMMs makes of them."""
        dtypes = self.weights_dtype, self.compute_dtype, self.rollout_dtype
        line = "dtypes: weights {}, compute {}, rollouts {}".format(*map(dtype_name, dtypes))
        if fast_dtype(self.device) == torch.bfloat16:
            return line
        line += "; this processor has no bfloat16 instructions"
        return f"{line}: bfloat16 GEMMs are slow" if torch.bfloat16 in dtypes else line


def resolve_machine(cfg: Config, *, trains: bool = True) -> Machine:
    """The machine that a configuration asks for.

    trains: False where a model only samples. Then the head is not used and its backend not
    checked, and other processes may run beside this one.

    Raises ConfigError for a GPU that is not there, dtypes that do not go together, settings that
    several processes cannot have, a head backend that cannot run, and offloading without a GPU.
    """
    machine = machine_on(_device(cfg.trainer.device), cfg)
    if not trains:
        return machine
    if not machine.is_gpu:
        check_no_offloading(cfg)
    if is_started_with_others():
        check_over_ranks(cfg)
    world, device = join(on_gpu=machine.is_gpu, timeout_s=cfg.trainer.timeout_s), machine.device
    backend = _head_backend(cfg.model.head_backend, device, machine.compute_dtype)
    if machine.is_gpu and world.size > 1:
        device = torch.device("cuda", world.local_rank)
    check_parts(cfg, world.size, backend)
    _check_top_k(cfg.rollout.top_k, backend)
    return dataclasses.replace(
        machine,
        device=device,
        head_backend=backend,
        world=world,
        data=world.every(cfg.trainer.tensor_parallel),
        tensor_parallel=cfg.trainer.tensor_parallel,
        replicas=cfg.trainer.replicas,
    )


def machine_on(device: torch.device, cfg: Config) -> Machine:
    """The machine of a configuration on some device, which need not be there.

    Raises ConfigError for dtypes that do not go together.
    """
    weights, compute = _model_dtypes(cfg, device)
    auto = cfg.rollout.dtype == "auto"
    rollout = fast_dtype(device) if auto else _DTYPES[cfg.rollout.dtype]
    return Machine(device, weights, compute, rollout, cfg.model.head_backend)


def auto_device() -> torch.device:
    """The GPU where torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for its GEMMs, else float32."""
    return torch.bfloat16 if multiplies_bfloat16(device.type) else torch.float32


def dtype_name(dtype: torch.dtype) -> Literal["float32", "bfloat16"]:
    """The name of a dtype in a configuration."""
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def _device(requested: str) -> torch.device:
    device = auto_device()
    if requested == "cuda" and device.type != "cuda":
        reason = "torch sees no CUDA device"
        raise ConfigError("trainer.device", requested, reason, 'Use "cpu" or "auto"')
    return device if requested == "auto" else torch.device(requested)


def _model_dtypes(cfg: Config, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Of the weights and of their GEMMs."""
    weights = _DTYPES[cfg.model.dtype]
    if cfg.model.compute_dtype == "auto":
        # Layers of bfloat16 weights compute in nothing else.
        return weights, weights if weights == torch.bfloat16 else fast_dtype(device)
    compute = _DTYPES[cfg.model.compute_dtype]
    if (weights, compute) == (torch.bfloat16, torch.float32):
        reason = "layers whose weights are held in bfloat16 compute in it"
        fix = 'Set model.dtype to "float32", or this to "bfloat16"'
        raise ConfigError("model.compute_dtype", "float32", reason, fix)
    return weights, compute


def check_no_offloading(cfg: Config) -> None:
    """Raise ConfigError for a setting that moves something from a GPU to the CPU."""
    for key, value in (
        ("model.activation_offloading", cfg.model.activation_offloading),
        ("trainer.offload", cfg.trainer.offload),
        ("rollout.offload_optimizer", cfg.rollout.offload_optimizer),
    ):
        if value not in (False, "none"):
            reason = "moves something from a GPU to CPU memory, and the device is a CPU"
            raise ConfigError(key, value, reason, "Leave it out, or train on a GPU")


def _check_top_k(top_k: int, head_backend: str) -> None:
    if top_k and head_backend == "fused":
        reason = "the loss is over the tokens that were kept, and the fused head takes all of them"
        fix = 'Set it to 0, or model.head_backend = "chunked"'
        raise ConfigError("rollout.top_k", top_k, reason, fix)


def _head_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    try:
        return resolve_backend(name, device.type, dtype)
    except ValueError as error:
        reason, fix = str(error).removeprefix(f"backend = {name!r}: ").split("; ", 1)
        raise ConfigError("model.head_backend", name, reason, fix.capitalize()) from error
