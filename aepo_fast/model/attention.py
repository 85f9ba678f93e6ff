"""Attention that transformers does not bring: "varlen" for GPUs, "grouped" for CPUs.

varlen: packed attention with torch's own variable-length kernel, without flash-attn. Rows packed
end to end are told apart by their position_ids, which restart at 0. With a mask or a key-value
cache (rollouts) it is sdpa.

grouped: query heads share their keys and values as they are, instead of copies of them. Single
tokens are decoded in C++, short rows go by two GEMMs a group, whose probabilities are never in
float32, and long ones by torch's kernel.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from aepo_kernels.cpu import layers

# From so many tokens on torch's kernel was faster on a CPU, and it keeps no probabilities.
_LONG = 128

# The layers of a model share one position_ids tensor: its segments are found once, since finding
# them waits for the GPU.
_last_segments: list[tuple[weakref.ref[torch.Tensor], torch.Tensor, int]] = []


def segments(position_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Cumulative lengths [S + 1], int32, and greatest length of the rows packed in [B, L]."""
    for reference, bounds, longest in tuple(_last_segments):  # once: a second thread may write
        if reference() is position_ids:
            return bounds, longest
    flat = position_ids.flatten()
    starts = (flat == 0).nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([flat.numel()])]).int()
    longest = int(bounds.diff().max())
    _last_segments[:] = [(weakref.ref(position_ids), bounds, longest)]
    return bounds, longest


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,  # as transformers calls it
) -> tuple[torch.Tensor, None]:
    """Causal attention within each packed row: [B, heads, L, D] to [B, L, heads, D]."""
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[return-value]
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(f'model.attention = "varlen": cannot apply {name}; use "sdpa"')
    bounds, longest = segments(options["position_ids"])
    window = options.get("sliding_window")
    output = varlen.varlen_attn(
        *(states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)),
        cu_seq_q=bounds,
        cu_seq_k=bounds,
        max_q=longest,
        max_k=longest,
        scale=options.get("scaling"),
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, torch.Tensor)
    return output.view(query.shape[0], query.shape[2], *output.shape[1:]), None


def varlen_mask(*args: Any, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
    """No mask for packed rows; that of sdpa where padding is given."""
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **options)


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    decode_in_cpp: bool = False,
    **options: Any,  # as transformers calls it
) -> tuple[torch.Tensor, None]:
    """Attention in value's dtype: [B, heads, L, D] over [B, key heads, S, D] to [B, L, heads, D].

    attention_mask: [B, 1, L, S], added to the scores. decode_in_cpp: single tokens without a
    gradient are decoded in C++, which reads keys and values without a copy of them; an argument of
    the model's own call, which transformers hands on.

    Raises ValueError for what it cannot apply.
    """
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(f'model.attention = "grouped": cannot apply {name}; use "eager"')
    batch, heads, length, width = query.shape
    if decode_in_cpp and length == 1 and not torch.is_grad_enabled():
        mask = None if attention_mask is None else attention_mask[:, 0, 0, : key.shape[2]]
        query, key = query[:, :, 0].to(value.dtype), key.to(value.dtype)
        return layers.decode_attention(query, key, value, mask, scaling)[:, None], None
    shared, total = key.shape[1:3]
    with torch.autocast(query.device.type, enabled=False):
        if length >= _LONG:
            if attention_mask is not None:
                attention_mask = attention_mask[..., :total].to(value.dtype)
            query, key = query.to(value.dtype), key.to(value.dtype)
            output = F.scaled_dot_product_attention(
                query, key, value, attention_mask, scale=scaling, enable_gqa=True
            )
            return output.transpose(1, 2), None
        query = (query * scaling).to(value.dtype).reshape(batch * shared, -1, width)
        keys = key.to(value.dtype).reshape(batch * shared, total, width)
        scores = torch.bmm(query, keys.mT).view(batch, shared, -1, length, total)
        if attention_mask is not None:
            scores = scores + attention_mask[:, :, None, :, :total].to(value.dtype)
        # In half precision softmax still computes in float32.
        weights = torch.softmax(scores, -1).view(batch * shared, -1, total)
        output = torch.bmm(weights, value.reshape(batch * shared, total, -1))
    return output.view(batch, heads, length, -1).transpose(1, 2), None


def varlen_groups_heads() -> bool:
    """Whether torch's kernel takes fewer key than query heads, as torch 2.11's does not."""
    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def register() -> None:
    """Make attn_implementation="varlen" and "grouped" known to transformers."""
    AttentionInterface.register("varlen", varlen_attention)
    AttentionMaskInterface.register("varlen", varlen_mask)
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", eager_mask)
