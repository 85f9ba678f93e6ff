"""What vLLM returns, as completions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from aepo_fast.model.kept import padded
from aepo_fast.rollout.engine import RolloutError
from aepo_fast.samples import Completion, Request


def completions(request: Request, output: Any, version: int) -> list[Completion]:
    """The completions of a request, in order; raises RolloutError where vLLM did not end one.

    version: of the weights that sampled.
    """
    samples = sorted(output.outputs, key=lambda sample: sample.index)
    if len(samples) != request.num_samples:
        raise RolloutError(f"vLLM returned {len(samples)} of {request.num_samples} samples")
    return [_completion(request, sample, version) for sample in samples]


def _completion(request: Request, sample: Any, version: int) -> Completion:
    if sample.finish_reason not in ("stop", "length"):
        raise RolloutError(
            f"vLLM ended a request with {sample.finish_reason!r}: it was aborted or did not fit "
            "the cache; raise rollout.gpu_memory_utilization or rollout.cpu_kv_cache_gib"
        )
    ids, found, kept = tuple(sample.token_ids), sample.logprobs, None
    if request.with_kept:
        firsts = zip(found.start_indices, ids, strict=True)
        logprobs, kept = tuple(found.logprobs[start] for start, _ in firsts), padded(_kept(found))
    else:
        logprobs = tuple(at[token].logprob for at, token in zip(found, ids, strict=True))
    return Completion(
        prompt_ids=request.prompt_ids,
        completion_ids=ids,
        logprobs=logprobs,
        finish_reason=sample.finish_reason,
        temperature=request.temperature,
        weights_version=version,
        kept_ids=kept,
    )


def _kept(found: Any) -> Iterator[list[int]]:
    """The ids that were kept of each token: those whose log-prob is finite.

    found: vLLM's FlatLogprobs, of each token itself first and then of the most likely ones.
    """
    for start, stop in zip(found.start_indices, found.end_indices, strict=True):
        pairs = zip(found.token_ids[start:stop], found.logprobs[start:stop], strict=True)
        # The token is there twice, unless too many others are as likely.
        yield list({token: None for token, logprob in pairs if logprob > -math.inf})
