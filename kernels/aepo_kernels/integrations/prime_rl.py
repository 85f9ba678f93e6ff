"""prime-rl's chunked heads by `linear_logprob`, with the gradient of the entropy."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from aepo_kernels.api import linear_logprob
from aepo_kernels.integrations import seams
from aepo_kernels.integrations.heads import logit_settings

_PEER = "prime_rl"
_HEADS = (
    ("prime_rl.trainer.models.layers.lm_head", "FusedOutputLinear"),
    ("prime_rl.trainer.models.layers.lm_head_gemma", "GemmaFusedOutputLinear"),
)
_INJECT = "inject_prime_lm_head"
_PARAMETERS = "self", "hidden_states", "labels", "temperature"


def install() -> str:
    """Let prime-rl's fused heads compute by `linear_logprob`; returns what was replaced.

    They run where fused_lm_head_token_chunk_size is set; the number itself is not used any more.
    A model's logit scale, which prime-rl's own heads leave out, is read from its config. Call it in
    the trainer's process, before the model is made. Raises ImportError where prime-rl is missing or
    a function takes other arguments.
    """
    version = seams.installed_version("prime-rl")
    classes = [
        getattr(seams.import_peer(module, "install prime-rl from its repository"), name)
        for module, name in _HEADS
    ]
    for head in classes:
        if head.forward is not forward:
            where = f"prime-rl {version}: {head.__name__}.forward"
            seams.check_parameters(head.forward, _PARAMETERS, where)
    own = getattr(seams.import_peer(_HEADS[0][0], ""), _INJECT)
    if not hasattr(own, "replaces"):
        where = f"prime-rl {version}: {_INJECT}"
        seams.check_parameters(own, ("model", "chunk_size"), where)
    replaced = [seams.replace(head, "forward", forward, _PEER) for head in classes]
    inject = own if hasattr(own, "replaces") else _knowing_the_scale(own)
    for module in seams.modules_with("prime_rl.", _INJECT, own):
        replaced.append(seams.replace(module, _INJECT, inject, _PEER))
    return f"prime-rl {version}: {', '.join(replaced)}"


def uninstall() -> None:
    """Put prime-rl's own forwards back; nothing where `install` was not called."""
    seams.restore(_PEER)


def forward(
    self: Any, hidden_states: Tensor, labels: Tensor | None = None, temperature: Any = None
) -> dict[str, Tensor]:
    """Log-probs and entropies in float32, [B, S], as prime-rl's heads return them.

    self: the head, a linear layer; it has a `softcap` if it is Gemma's, and a `logit_scale` if its
    model was made after `install`.
    hidden_states: [B, S, H]. labels: [B, S]; negative ones stand for tokens that a mask drops, and
    give some finite number. temperature: a float or [B, S].
    """
    if labels is None or temperature is None:
        raise ValueError("labels, temperature: the fused head needs both for log-probs")
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1)
    found = linear_logprob(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        self.weight,
        labels.long().clamp(min=0).reshape(-1),
        temperature=temperature,
        softcap=getattr(self, "softcap", None),
        logit_scale=getattr(self, "logit_scale", 1.0),
        ignore_index=None,  # so that nothing waits for a GPU
    )
    return {
        "logprobs": found.logprob.view(labels.shape),
        "entropy": found.entropy.view(labels.shape),
    }


def _knowing_the_scale(own: Any) -> Any:
    """prime-rl's function that gives a model its head, which then knows the model's scale."""

    @functools.wraps(own)
    def inject_prime_lm_head(model: Any, chunk_size: int | None = None) -> None:
        own(model, chunk_size)
        model.lm_head.logit_scale = logit_settings(model.config)[0]

    inject_prime_lm_head.replaces = own  # type: ignore[attr-defined]
    return inject_prime_lm_head
