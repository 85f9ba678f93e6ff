"""Sampling from the most likely tokens alone (top-k, top-p), and the same tokens in the loss.

A sampler that leaves tokens out draws from softmax over those that it kept. The loss must take the
log-prob of that distribution, so the kept ids of each token go with a sample. The trained policy
replays them: its log-probs are over the same ids, whatever it would keep by itself by now. That is
"Keep Sampling Mask" of DeepSeek-V3.2 (arXiv 2512.02556).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from aepo_fast.config.errors import require
from aepo_fast.config.sections import RolloutConfig
from aepo_fast.samples import Sample


def room(top_k: int, vocab: int | None = None) -> int:
    """How many ids are kept of a token at most.

    More than top_k: those that are as likely as its last one count, too, and bfloat16 logits have
    many such. vocab: of the model, where it may be less.
    """
    most = top_k + top_k // 4 + 16
    return most if vocab is None else min(most, vocab)


def check_top_k(rollout: RolloutConfig, vocab: int) -> None:
    """Raise ConfigError where all ids of a vocabulary would be kept."""
    reason = f"leaves none of the model's {vocab} tokens out"
    require(rollout.top_k < vocab, "rollout.top_k", rollout.top_k, reason, "Lower it, or leave out")


def keep_most_likely(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits over temperature that are drawn from, and their ids, as vLLM chooses them.

    First temperature, then the top_k largest and all that equal the last of them, then of these the
    fewest whose probabilities among them sum to top_p or more. logits: [B, V]. temperature, top_k,
    top_p: [B], above 0. Of ties, `room` bounds the number. Returns fp32 [B, K], minus infinity for
    what is left out, and int64 [B, K], -1 there.
    """
    columns = room(int(top_k.max()), logits.shape[1])
    largest, ids = (logits.float() / temperature.float()[:, None]).topk(columns)
    last = largest.gather(1, top_k.clamp(max=columns)[:, None] - 1)
    largest = largest.masked_fill(largest < last, -torch.inf)  # a row of NaN stays, and is refused
    if top_p is not None:
        largest = cut_at_top_p(largest, torch.ones_like(temperature), top_p)
    return largest, ids.masked_fill(largest == -torch.inf, -1)


def cut_at_top_p(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """The logits [B, V] in fp32, minus infinity of the tokens that top_p [B] leaves out."""
    logits = logits.float()
    probs = torch.softmax(logits / temperature.float()[:, None], dim=-1)
    probs, order = probs.sort(dim=-1, descending=True, stable=True)  # [B, V]
    before = probs.cumsum(dim=-1, dtype=torch.float64) - probs
    # A row of NaN keeps them, and is refused.
    out = (before >= top_p.double()[:, None]) & (top_p < 1)[:, None]
    return logits.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)


def padded(kept: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
    """The kept ids of each token, of any number, as int32 [tokens, K], padded with -1."""
    rows = list(kept)
    found = np.full((len(rows), max(map(len, rows), default=1)), -1, dtype=np.int32)
    for row, ids in zip(found, rows, strict=True):
        row[: len(ids)] = ids
    return found


def kept_ids(samples: Sequence[Sample], indices: Sequence[int]) -> torch.Tensor | None:
    """The kept ids of the tokens of samples[indices], int32 [N, K], padded with -1.

    None where they were drawn from all tokens.
    """
    parts = [samples[index].completion.kept_ids for index in indices]
    known = [part for part in parts if part is not None]
    if not known:
        return None
    assert len(known) == len(parts), "samples of a step are drawn alike"
    width = max(part.shape[1] for part in known)
    found = np.full((sum(map(len, known)), width), -1, dtype=np.int32)
    start = 0
    for part in known:
        found[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return torch.from_numpy(found)


def kept_metrics(samples: Sequence[Sample], indices: Sequence[int]) -> dict[str, float]:
    """The mean number of kept ids, over the tokens of samples[indices]; empty where all are."""
    parts = [samples[index].completion.kept_ids for index in indices]
    counts = [(part >= 0).sum(1) for part in parts if part is not None]  # [tokens] each
    return {"sampling/kept_tokens": float(np.concatenate(counts).mean())} if counts else {}
