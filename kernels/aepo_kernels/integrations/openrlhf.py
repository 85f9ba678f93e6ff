"""OpenRLHF's actor without float32 logits of all tokens."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from aepo_kernels.integrations import seams
from aepo_kernels.integrations.heads import unwrapped

_PEER = "openrlhf"
_MODULE = "openrlhf.models.actor"
_PARAMETERS = (
    "self",
    "sequences",
    "action_mask",
    "attention_mask",
    "return_output",
    "allgather_logits",
    "return_logprobs",
    "ring_attn_group",
    "packed_seq_lens",
    "return_entropy",
    "mm_inputs",
)


def install() -> str:
    """Let OpenRLHF >= 0.11 compute an actor's log-probs by a fused head; returns what was replaced.

    The actor's model is fused at its first call, see `transformers.fuse_head`. Where a caller wants
    the logits themselves, or gives images, OpenRLHF's own method runs. Call it in every worker.
    Raises ImportError where OpenRLHF is missing, older, or its method takes other arguments.
    """
    version = seams.check_version("openrlhf", "0.11")
    actor = seams.import_peer(_MODULE, "install openrlhf with its dependencies").Actor
    if not hasattr(actor.forward, "replaces"):
        where = f"openrlhf {version}: {_MODULE}.Actor.forward"
        seams.check_parameters(actor.forward, _PARAMETERS, where)
        return f"openrlhf {version}: " + seams.replace(
            actor, "forward", _fused_forward(actor.forward), _PEER
        )
    return f"openrlhf {version}: " + seams.replace(actor, "forward", actor.forward, _PEER)


def uninstall() -> None:
    """Put OpenRLHF's own method back. A model that ran in between stays fused."""
    seams.restore(_PEER)


def _fused_forward(own: Any) -> Any:
    """The method in the place of an actor's own."""

    @functools.wraps(own)
    def forward(
        self: Any,
        sequences: Tensor,
        action_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_output: bool = False,
        allgather_logits: bool = False,
        return_logprobs: bool = False,
        ring_attn_group: Any = None,
        packed_seq_lens: list[int] | None = None,
        return_entropy: bool = False,
        **mm_inputs: Any,
    ) -> Any:
        wants_logits = action_mask is None and not return_logprobs
        if wants_logits or mm_inputs or getattr(self, "is_vlm", False):
            return own(
                self,
                sequences,
                action_mask,
                attention_mask=attention_mask,
                return_output=return_output,
                allgather_logits=allgather_logits,
                return_logprobs=return_logprobs,
                ring_attn_group=ring_attn_group,
                packed_seq_lens=packed_seq_lens,
                return_entropy=return_entropy,
                **mm_inputs,
            )
        output = _scores(self, sequences, attention_mask, ring_attn_group)
        logprobs, output.entropy = output.logprobs[:, :-1], output.entropy[:, :-1]
        if action_mask is not None:
            logprobs = logprobs[:, -action_mask.shape[1] :] * action_mask.float()
        return (logprobs, output) if return_output else logprobs

    forward.replaces = own  # type: ignore[attr-defined]
    return forward


def _scores(actor: Any, sequences: Tensor, mask: Tensor | None, group: Any) -> Any:
    """Log-probs and entropies of each next token, [B, L] in the order of sequences.

    The last one of a row is that of the first token, which the caller drops.
    """
    from aepo_kernels.integrations.transformers import fuse_head, is_fused

    if not is_fused(actor.model):
        fuse_head(unwrapped(actor.model), check=False)
    given: dict[str, Any] = {"fused_logprobs": True, "temperature": actor.temperature}
    if not actor.packing_samples:
        assert mask is not None
        positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)
        labels = torch.roll(sequences, -1, 1)
        given |= {"attention_mask": mask, "position_ids": positions, "shift_labels": labels}
        return actor.model(sequences, **given)
    module = sys.modules[_MODULE]
    ids, positions, labels, pad, indices = module.unpad_and_slice_tensor(sequences, mask, group)
    output = actor.model(ids, position_ids=positions, shift_labels=labels, **given)
    for name in ("logprobs", "entropy"):
        whole = module.gather_and_pad_tensor(output[name], group, pad, indices, *sequences.shape)
        setattr(output, name, whole)
    return output
