"""What every candidate is given and gives back, and the losses that they share."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CLIP_LOW, CLIP_HIGH = 0.2, 0.2


@dataclass(frozen=True)
class Mode:
    """What is computed: log-probs without gradient, or a loss with its gradients.

    second: also the log-probs at the second temperature. sparse: 40% of the sequences have a zero
    advantage. frozen: hidden alone has a gradient, as beside adapters that leave the head out.
    loss: "grpo_aepo" or "ce", or None for no gradient.
    """

    name: str
    title: str
    loss: str | None = None
    second: bool = False
    sparse: bool = False
    frozen: bool = False

    @property
    def training(self) -> bool:
        """Whether there are gradients."""
        return self.loss is not None


MODES = (
    Mode("forward", "log-prob and entropy, no gradient"),
    Mode(
        "two_temperatures",
        "log-prob and entropy, and log-prob at a second temperature",
        second=True,
    ),
    Mode("training", "GRPO + AEPO loss, forward and backward", loss="grpo_aepo"),
    Mode(
        "training_sparse",
        "GRPO + AEPO loss, 40% zero advantages, forward and backward",
        loss="grpo_aepo",
        sparse=True,
    ),
    Mode("ce", "cross entropy only, forward and backward", loss="ce"),
    Mode(
        "frozen",
        "GRPO + AEPO loss with a frozen head, forward and backward",
        loss="grpo_aepo",
        frozen=True,
    ),
)


@dataclass(frozen=True)
class Inputs:
    """One problem, the same for every candidate.

    hidden: [N, H] and weight: [V, H], leaves in the benchmark's dtype; a frozen weight requires no
    gradient. targets: [N] int64.
    old_logprob, advantage, aux_weight: [N] float32. active: [A] int64, positions whose loss can
    have a gradient, or None for all. The advantage is constant over each of `num_sequences` equal
    runs of tokens.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old_logprob: Tensor
    advantage: Tensor
    aux_weight: Tensor
    active: Tensor | None
    num_sequences: int
    temperature: float
    second_temperature: float


@dataclass(frozen=True)
class Outputs:
    """What a candidate computed: per-token values [N] and a scalar loss; None for what it lacks."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    second_logprob: Tensor | None = None
    loss: Tensor | None = None


@dataclass(frozen=True)
class Peer:
    """A candidate: run(inputs, mode) behind a name.

    temperatures: 2 if one call does both, 1 if a second call does the other, 0 if it knows none.
    losses: what it can compute in training; "grpo" is a loss of its own without the AEPO term.
    per_token: whether it returns log-probs. training_only: elsewhere it is a twin.
    """

    name: str
    run: Callable[[Inputs, Mode], Outputs]
    unavailable_reason: Callable[[torch.device, torch.dtype], str | None]
    version: Callable[[], str | None]
    losses: tuple[str, ...] = ("grpo_aepo", "ce")
    temperatures: int = 1
    has_entropy: bool = True
    per_token: bool = True
    training_only: bool = False
    is_ours: bool = False

    def loss_in(self, mode: Mode) -> str | None:
        """The loss that it computes in a mode."""
        return "grpo" if mode.loss == "grpo_aepo" and "grpo" in self.losses else mode.loss

    def excluded(self, mode: Mode) -> str | None:
        """Why it has no place in a mode, or None."""
        if not mode.training and self.training_only:
            return "differs in training only"
        if not mode.training and not self.per_token:
            return "no per-token log-prob"
        if mode.second and self.temperatures == 0:
            return "no temperature"
        loss = self.loss_in(mode)
        if loss is not None and loss not in self.losses:
            return "cross entropy only" if self.losses == ("ce",) else "no cross entropy"
        return None

    def lacks(self, mode: Mode) -> str:
        """What it leaves out of a mode that the others do; empty if nothing."""
        parts = []
        if not self.has_entropy and mode.loss != "ce":
            parts.append("no entropy")
        if self.temperatures == 0 and mode.loss != "ce":
            parts.append("no temperature")
        if mode.second and self.temperatures == 1:
            parts.append("two calls")
        if self.loss_in(mode) == "grpo":
            parts.append("no AEPO term")
        return ", ".join(parts)


def grpo_aepo_loss(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, aux_weight: Tensor
) -> Tensor:
    """The summed clipped surrogate plus AEPO's REINFORCE term on resampled positives; [N] each."""
    ratio = (logprob - old_logprob).exp()
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    return -(surrogate + aux_weight * logprob).sum()


def loss_of(loss: str | None, logprob: Tensor, *rows: Tensor) -> Tensor | None:
    """A loss by its name on log-probs [C]; rows are the old log-probs, advantages, weights [C]."""
    if loss is None:
        return None
    if loss == "ce":
        # Not -logprob.sum(), whose gradient has stride 0, which some kernels do not take.
        return (-logprob).sum()
    old_logprob, advantage, aux_weight = rows
    if loss == "grpo":
        aux_weight = torch.zeros_like(aux_weight)
    return grpo_aepo_loss(logprob, old_logprob, advantage, aux_weight)


def shared_loss(inputs: Inputs, mode: Mode, logprob: Tensor) -> Tensor | None:
    """The mode's loss on a candidate's per-token log-probs [N]; None where there is none."""
    rows = inputs.old_logprob, inputs.advantage, inputs.aux_weight
    return loss_of(mode.loss, logprob.float(), *rows)


class LeftOut(RuntimeError):
    """Raised by a candidate where running it would make no sense; the message says why."""


def import_problem(package: str, *modules: str) -> str | None:
    """Why a package's modules cannot be used here, or None."""
    for module in modules:
        try:
            importlib.import_module(module)
        # Packages that compile at import fail in their own ways; only the reason matters here.
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
            if missing:
                return f"{package} is not installed"
            return f"import of {module} failed: {type(error).__name__}: {error}"
    return None


def skip_package_imports(package: str, *subpackages: str) -> None:
    """Put bare packages in place of a package and some below it, whose __init__ would import more.

    Nothing where the package is not installed.
    """
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # it is a bare one already
        return
    if spec is None or not spec.submodule_search_locations:
        return
    (root, *_) = spec.submodule_search_locations
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]
    for name in (package, *subpackages):
        module = types.ModuleType(name)
        module.__path__ = ["/".join([root, *name.split(".")[1:]])]
        sys.modules[name] = module
