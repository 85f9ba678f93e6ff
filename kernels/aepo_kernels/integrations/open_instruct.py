"""open-instruct's log-probs of GRPO without logits."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from aepo_kernels.integrations import seams
from aepo_kernels.integrations.heads import unwrapped

_PEER, _MODULE, _NAME = "open_instruct", "open_instruct.grpo_utils", "forward_for_logprobs"
_PARAMETERS = (
    "model",
    "query_responses",
    "attention_mask",
    "position_ids",
    "pad_token_id",
    "temperature",
    "return_entropy",
)


def install() -> str:
    """Let open-instruct's GRPO compute log-probs by a fused head; returns what was replaced.

    The model is fused at its first call, see `transformers.fuse_head`; it must be one of
    transformers. Call it in every learner. Raises ImportError where open-instruct is missing or the
    function takes other arguments; what it takes beyond those of 2025 may keep its default only.
    """
    version = seams.installed_version("open-instruct")
    utils = seams.import_peer(_MODULE, "install open-instruct from its repository")
    own = getattr(utils, _NAME)
    if not hasattr(own, "replaces"):
        where = f"open-instruct {version}: {_MODULE}.{_NAME}"
        seams.check_first_parameters(own, _PARAMETERS, where)
    fused = own if hasattr(own, "replaces") else _fused(own)
    modules = seams.modules_with("open_instruct.", _NAME, own)
    replaced = [seams.replace(module, _NAME, fused, _PEER) for module in modules]
    return f"open-instruct {version}: {', '.join(replaced)}"


def uninstall() -> None:
    """Put open-instruct's own function back. A model that ran in between stays fused."""
    seams.restore(_PEER)


def _fused(own: Any) -> Any:
    """The function in the place of open-instruct's own."""
    more = list(inspect.signature(own).parameters.values())[len(_PARAMETERS) :]

    def forward_for_logprobs(
        model: Any,
        query_responses: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        pad_token_id: int,
        temperature: float,
        return_entropy: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        for parameter in more:
            if options.pop(parameter.name, parameter.default) is not parameter.default:
                reason = "is not passed on to the fused model; uninstall(), or leave it out"
                raise ValueError(f"{parameter.name}: {reason}")
        if options:
            raise TypeError(f"{_NAME} got unexpected arguments {sorted(options)}")
        return _logprobs(
            model,
            query_responses,
            attention_mask,
            position_ids,
            pad_token_id,
            temperature,
            return_entropy,
        )

    forward_for_logprobs.replaces = own  # type: ignore[attr-defined]
    return forward_for_logprobs


def _logprobs(
    model: Any,
    ids: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    pad: int,
    temperature: float,
    wants_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs, and entropies without a gradient, of the tokens after the first: [B, L - 1]."""
    from aepo_kernels.integrations.transformers import fuse_head, is_fused

    if not is_fused(model):
        fuse_head(unwrapped(model), check=False)
    if bool((positions.diff(dim=-1) < 0).any()):
        mask = None  # several sequences in a row: attention tells them apart by their positions
        kinds = set(getattr(unwrapped(model).config, "layer_types", None) or ())
        known = {"full_attention", "sliding_attention", "chunked_attention"}
        if kinds - known:
            reason = "keep a state that would run on from one packed sequence to the next"
            raise ValueError(f"layers of {sorted(kinds - known)} {reason}; uninstall()")
    labels = torch.where(ids == pad, 0, ids)  # a mask of the caller drops them
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        labels=labels,
        temperature=temperature,
        fused_logprobs=True,
    )
    return output.logprobs, output.entropy.detach() if wants_entropy else None
