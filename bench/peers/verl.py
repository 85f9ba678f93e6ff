"""verl's Triton linear cross entropy: log-prob and entropy."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import torch

from bench.common.environment import installed_version
from bench.peers.peer import (
    Inputs,
    Mode,
    Outputs,
    Peer,
    import_problem,
    shared_loss,
)

PACKAGE, MODULE = "verl", "verl.utils.kernel.linear_cross_entropy"
KERNELS = "verl.utils.kernel.kernels"


def peers() -> list[Peer]:
    """verl's kernel in its default backward."""
    return [Peer("verl Triton", run, unavailable_reason, lambda: installed_version(PACKAGE))]


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run here, or None."""
    problem = import_problem(PACKAGE, MODULE, KERNELS)
    if problem is not None and installed_version(PACKAGE) is not None:
        _skip_package_imports()
        problem = import_problem(PACKAGE, MODULE, KERNELS)
    return problem or (None if device.type == "cuda" else "needs CUDA")


def run(inputs: Inputs, mode: Mode) -> Outputs:
    """Log-prob and entropy, and the loss on them."""
    function = importlib.import_module(MODULE).linear_cross_entropy
    problem = inputs.hidden, inputs.weight, inputs.targets
    logprob, entropy = function(*problem, inputs.temperature, "none", None)
    second = None
    if mode.second:
        second, _ = function(*problem, inputs.second_temperature, "none", None)
    return Outputs(logprob, entropy, second, shared_loss(inputs, mode, logprob))


def _skip_package_imports() -> None:
    """Put bare packages in the place of `verl` and `verl.utils`.

    Their own __init__ files import the whole trainer (ray, tensordict), none of which the kernel
    uses.
    """
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        return
    root = spec.submodule_search_locations[0]
    for name in [name for name in sys.modules if name == "verl" or name.startswith("verl.")]:
        del sys.modules[name]
    for name, path in (("verl", root), ("verl.utils", f"{root}/utils")):
        module = types.ModuleType(name)
        module.__path__ = [path]
        sys.modules[name] = module
