"""Versions newer than tested: each is said once, and runs behind a check of its results."""

from __future__ import annotations

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine
from aepo_kernels import self_check
from aepo_kernels import versions as kernels

# docs/versions.md says what ran where.
TESTED = kernels.TESTED | {"transformers": ("5.17", "5.24"), "vllm": ("0.26", "0.32")}
_KERNELS = "the kernels are compared with plain torch before the run"
_MODEL = "log-probs of the sampler and the trainer are compared before the first step"
_CHECKS = {"torch": _KERNELS, "triton": _KERNELS, "transformers": _MODEL}


def check_versions(machine: Machine) -> None:
    """Warn of what a run uses and is newer than tested; compare the kernels where that may matter.

    Raises ConfigError where the head's kernels give other numbers than plain torch on the machine's
    device.
    """
    _is_newer("transformers")
    used = ("torch", "triton") if machine.is_gpu else ("torch",)
    newer = [_is_newer(name) for name in used]  # each is said
    if not any(newer) or machine.head_backend == "reference":
        return
    wrong = self_check.difference(machine.device, machine.compute_dtype, machine.head_backend)
    if wrong is not None:
        reason = f"{wrong}, with versions that are newer than tested"
        tested = (f"{name} {' to '.join(both)}" for name, both in kernels.TESTED.items())
        fix = f'Use "reference", or install {" and ".join(tested)}'
        raise ConfigError("model.head_backend", machine.head_backend, reason, fix)


def _is_newer(package: str) -> bool:
    version = kernels.installed_version(package)
    return kernels.warn_if_newer(package, version, TESTED[package][1], _CHECKS[package])
