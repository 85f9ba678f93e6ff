"""The problem that every kernel gets: hidden states, a head and a rollout's per-token numbers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from bench.peers.peer import Inputs, Mode

NUM_SEQUENCES = 32
ZERO_FRACTION = 0.4
TEMPERATURE, SECOND_TEMPERATURE = 1.0, 1.25
# Elements of the largest temporary on [chunk, V]; 1 GiB in float64.
CHUNK_ELEMENTS = 2**27


def make_inputs(
    tokens: int, hidden_size: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    """A problem whose laws go from nearly certain to nearly uniform, as a language model's do.

    Gradient filters and rounding errors depend on that, so plain noise would not do. Targets are
    drawn from the laws. Of the log-prob ratios 1% lie outside the clip range, none near its ends,
    where rounding would decide whether a token has a gradient.
    """
    if tokens % NUM_SEQUENCES:
        raise ValueError(f"tokens = {tokens}: must be a multiple of {NUM_SEQUENCES}")
    random = torch.Generator(device).manual_seed(seed)
    draw = {"generator": random, "device": device}
    weight = (torch.randn(vocab, hidden_size, **draw) / math.sqrt(hidden_size)).to(dtype)
    anchors = torch.randint(vocab, (tokens,), **draw)
    # The other logits have a spread of 2; the anchor's odds against all of them follow.
    odds = torch.empty(tokens, 1, device=device).uniform_(-4, 10, generator=random)
    directions = weight[anchors].float()
    directions /= directions.square().sum(1, keepdim=True)
    hidden = 2 * torch.randn(tokens, hidden_size, **draw) + (math.log(vocab) + 2 + odds) * (
        directions
    )
    hidden = hidden.to(dtype)
    targets, logprob = _sample(hidden, weight, random)
    shift = torch.empty(tokens, device=device).uniform_(-0.08, 0.08, generator=random)
    far = torch.rand(tokens, **draw) < 0.01
    advantage = torch.randn(NUM_SEQUENCES, **draw).repeat_interleave(tokens // NUM_SEQUENCES)
    return Inputs(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        targets,
        logprob + torch.where(far, 0.4 * shift.sign(), shift),
        advantage,
        0.1 * (advantage > 0),
        None,
        NUM_SEQUENCES,
        TEMPERATURE,
        SECOND_TEMPERATURE,
    )


def inputs_for(inputs: Inputs, mode: Mode) -> Inputs:
    """The same problem with zero advantages in 40% of its sequences, or a frozen head.

    It has them where the mode wants them. Only with zero advantages does `active` name tokens: to
    look for them would cost ours time in the other modes.
    """
    if mode.frozen:
        inputs = dataclasses.replace(inputs, weight=inputs.weight.detach())
    if not mode.sparse:
        return inputs
    length = len(inputs.targets) // inputs.num_sequences
    rows = torch.arange(inputs.num_sequences, device=inputs.advantage.device)
    share = round(inputs.num_sequences * ZERO_FRACTION)
    # Spread over the batch: a sequence is dropped whenever the running count reaches the next one.
    dropped = ((rows + 1) * share // inputs.num_sequences) > (rows * share // inputs.num_sequences)
    kept = (~dropped).repeat_interleave(length)
    return dataclasses.replace(
        inputs,
        advantage=inputs.advantage * kept,
        aux_weight=inputs.aux_weight * kept,
        active=kept.nonzero().squeeze(1),
    )


def save_inputs(inputs: Inputs, path: Path) -> None:
    """Write a problem to a file, for `load_inputs`."""
    known = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    detached = {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in known.items()
    }
    torch.save(detached, path)


def load_inputs(path: str, device: torch.device) -> Inputs:
    """A problem that `save_inputs` wrote, in memory of its own on `device`."""
    inputs = Inputs(**torch.load(path, map_location=device))
    inputs.hidden.requires_grad_()
    inputs.weight.requires_grad_()
    return inputs


@torch.no_grad()
def _sample(hidden: Tensor, weight: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens drawn from the laws at temperature 1, [N] int64, and their log-probs, float32."""
    targets, logprobs = [], []
    for rows in hidden.split(max(1, CHUNK_ELEMENTS // len(weight))):
        law = torch.log_softmax((rows @ weight.T).float(), -1)
        noise = torch.empty_like(law).exponential_(generator=random).log_()
        chosen = (law - noise).argmax(-1)
        targets.append(chosen)
        logprobs.append(law.gather(1, chosen[:, None])[:, 0])
    return torch.cat(targets), torch.cat(logprobs)
