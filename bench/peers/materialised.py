"""Plain PyTorch with all logits in memory, eager and compiled: the baseline."""

from __future__ import annotations

import functools
import os
import shutil

import torch
from torch import Tensor

from bench.peers.peer import Inputs, Mode, Outputs, Peer, shared_loss


def peers() -> list[Peer]:
    """The eager path and the compiled one."""
    eager = Peer(
        "torch eager",
        functools.partial(run, False),
        lambda device, dtype: None,
        lambda: torch.__version__,
        temperatures=2,
    )
    compiled = Peer(
        "torch.compile",
        functools.partial(run, True),
        unavailable_reason,
        lambda: torch.__version__,
        temperatures=2,
    )
    return [eager, compiled]


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled path cannot run here, or None."""
    if device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")):
        return None
    return "needs a C++ compiler"


def run(compiled: bool, inputs: Inputs, mode: Mode) -> Outputs:
    """Log-probs and entropies from all logits, and the loss on them."""
    function = _compiled() if compiled else scores
    logprob, entropy, second_logprob = function(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        inputs.temperature,
        inputs.second_temperature if mode.second else None,
        mode.loss != "ce",
    )
    return Outputs(logprob, entropy, second_logprob, shared_loss(inputs, mode, logprob))


def scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    second: float | None,
    wants_entropy: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """logprob, entropy (without gradient) and second log-prob, [N] float32."""
    return scores_of_logits(hidden @ weight.T, targets, temperature, second, wants_entropy)


def scores_of_logits(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    second: float | None,
    wants_entropy: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same from logits [N, V]."""
    logits = logits.float()
    law = torch.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)
    logprob = law.gather(1, targets[:, None])[:, 0]
    entropy = None
    if wants_entropy:
        with torch.no_grad():
            entropy = -(law.exp() * law).sum(-1)
    if second is None:
        return logprob, entropy, None
    tempered = logits / second
    target = tempered.gather(1, targets[:, None])[:, 0]
    return logprob, entropy, target - tempered.logsumexp(-1)


@functools.cache
def _compiled():
    return torch.compile(scores, dynamic=False)
