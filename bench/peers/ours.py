"""This project's backends."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from aepo_kernels import (
    LogprobOutput,
    __version__,
    backend_status,
    linear_logprob,
    linear_token_loss,
)
from bench.peers.peer import Inputs, LeftOut, Mode, Outputs, Peer, loss_of, shared_loss

# The reference backend makes all logits at once; beyond this it only costs memory and time.
REFERENCE_LIMIT = 2**25
# The small-memory case: few tokens at once (a quarter of them, where there are few), and gradients
# for so much of the vocabulary at once.
SMALL_CHUNK_TOKENS, SMALL_SLICE = 1024, 8192
DEFAULT = "chunked"


def peers() -> list[Peer]:
    """One candidate per backend, and the default one with little memory and by autograd."""
    names = [DEFAULT, *(name for name in backend_status() if name != DEFAULT)]
    small = functools.partial(run, DEFAULT, SMALL_CHUNK_TOKENS)
    return [
        *(_peer(f"ours ({name})", functools.partial(run, name, None), name) for name in names),
        _peer(f"ours ({DEFAULT}, small memory)", small, DEFAULT),
        # The loss outside, as with the peers: the log-probs' backward recomputes the logits.
        _peer(f"ours ({DEFAULT}, by autograd)", run_autograd, DEFAULT, training_only=True),
    ]


def _peer(
    name: str,
    function: Callable[[Inputs, Mode], Outputs],
    backend: str,
    *,
    training_only: bool = False,
) -> Peer:
    return Peer(
        name,
        function,
        lambda device, dtype: backend_status()[backend],
        lambda: __version__,
        temperatures=2,
        training_only=training_only,
        is_ours=True,
    )


def run_autograd(inputs: Inputs, mode: Mode) -> Outputs:
    """Log-probs and entropies, and the loss on them."""
    out = _logprob(DEFAULT, None, inputs, mode)
    loss = shared_loss(inputs, mode, out.logprob)
    return Outputs(out.logprob, out.entropy, out.second_logprob, loss)


def _logprob(backend: str, chunk_tokens: int | None, inputs: Inputs, mode: Mode) -> LogprobOutput:
    return linear_logprob(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        temperature=inputs.temperature,
        second_temperature=inputs.second_temperature if mode.second else None,
        ignore_index=None,
        chunk_tokens=chunk_tokens,
        backend=backend,
    )


def run(backend: str, chunk_tokens: int | None, inputs: Inputs, mode: Mode) -> Outputs:
    """Log-probs and entropies, or the whole loss in training."""
    num_tokens = len(inputs.targets)
    if chunk_tokens is not None:
        chunk_tokens = max(1, min(chunk_tokens, num_tokens // 4))
    size = num_tokens * len(inputs.weight)
    if backend == "reference" and size > REFERENCE_LIMIT:
        raise LeftOut("not timed at this size: it makes all logits at once")
    if not mode.training:
        out = _logprob(backend, chunk_tokens, inputs, mode)
        return Outputs(out.logprob, out.entropy, out.second_logprob)

    def token_loss(
        logprob: torch.Tensor,
        entropy: torch.Tensor,
        second: torch.Tensor | None,
        *rows: torch.Tensor,
    ) -> torch.Tensor | None:
        return loss_of(mode.loss, logprob, *rows)

    result = linear_token_loss(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        token_loss,
        inputs.old_logprob,
        inputs.advantage,
        inputs.aux_weight,
        temperature=inputs.temperature,
        second_temperature=inputs.second_temperature if mode.second else None,
        ignore_index=None,
        active=inputs.active,
        chunk_tokens=chunk_tokens,
        # A frozen head has no gradient to slice.
        weight_slice=None if chunk_tokens is None or mode.frozen else SMALL_SLICE,
        backend=backend,
    )
    return Outputs(result.logprob, result.entropy, result.second_logprob, result.loss)
