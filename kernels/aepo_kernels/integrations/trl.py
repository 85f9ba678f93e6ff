"""TRL's chunked log-probs, which GRPO, RLOO, SFT, DPO and KTO train with, by `linear_logprob`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from aepo_kernels.api import linear_logprob
from aepo_kernels.integrations import seams

_PEER = "trl"
_OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_PARAMETERS = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)


def install() -> str:
    """Let TRL >= 1.15 compute log-probs by `linear_logprob`; returns what was replaced.

    Call it before or after a trainer is made: TRL looks the function up at every forward pass.
    Raises ImportError where TRL is missing, older, or its function takes other arguments.
    """
    version = seams.check_version("trl", "1.15")
    utils = seams.import_peer("trl.trainer.utils", "pip install -U trl")
    chunked = getattr(utils, "_ChunkedLogProbFunction", None)
    if chunked is None:
        reason = "has no chunked log-probs: _ChunkedLogProbFunction is missing or needs Triton"
        raise ImportError(f"trl {version} {reason}; use TRL 1.16 or newer")
    if chunked is not _HEAD:
        where = f"trl {version}: trl.trainer.utils._ChunkedLogProbFunction.forward"
        seams.check_parameters(chunked.forward, _PARAMETERS, where)
    replaced = [seams.replace(utils, "_ChunkedLogProbFunction", _HEAD, _PEER)]
    if hasattr(utils, "_use_triton"):
        # TRL scores the prompt's tokens as well where it has no Triton.
        replaced.append(seams.replace(utils, "_use_triton", _only_labelled, _PEER))
    return f"trl {version}: {', '.join(replaced)}"


def uninstall() -> None:
    """Put TRL's own function back; nothing where `install` was not called."""
    seams.restore(_PEER)


def logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = _OPTIONAL,
) -> tuple[Tensor | None, ...]:
    """Log-prob, entropy, log sum p^2, mean logit and whether the target is the likeliest, [N] each.

    Arguments as of TRL's function: hidden [N, H], weight [V, H], bias [V], targets [N].
    chunk_size is not used. What `outputs` does not name is None; only log-prob and entropy have a
    gradient. Raises ValueError under ZeRO-3, which takes the weight away before the backward pass.
    """
    seams.refuse_zero3(weight)
    wanted: dict[str, Any] = {name: True for name in ("mean_logits", "is_top1") if name in outputs}
    found = linear_logprob(
        hidden,
        weight,
        targets,
        temperature=temperature,
        bias=bias,
        softcap=final_logit_softcapping,
        logit_scale=logit_scale,
        ignore_index=None,
        sum_squares="log_sum_sq_probs" in outputs,
        grad_of=None if "entropy" in outputs else ("logprob",),
        **wanted,
    )._asdict()
    squares = found["sum_squares"]
    return (
        found["logprob"],
        found["entropy"] if "entropy" in outputs else None,
        None if squares is None else squares.log(),
        found.get("mean_logits"),
        found.get("is_top1"),
    )


def _only_labelled(device: object) -> bool:
    return True


# TRL calls `.apply`, as of an autograd function.
_HEAD = SimpleNamespace(apply=logprobs)
