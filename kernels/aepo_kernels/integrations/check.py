"""Our head and every installed peer's on twelve tiny models, against float64.

    python -m aepo_kernels.integrations.check [--dtype bfloat16] [--temperature 0.7] [--ms]

The exit code is 1 where our head is further from float64 than the model's own logits allow.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aepo_kernels.integrations.heads import backbone_of
from aepo_kernels.integrations.tiny_models import MODELS, VOCAB, tiny_model

# Log-probs [B, L - 1] of the next tokens, from a model, ids [B, L] and a temperature.
Candidate = Callable[[Any, Tensor, float], Tensor]


class Errors(NamedTuple):
    """Of log-probs, the largest in nats; of gradients, the largest over the largest gradient."""

    logprob: float
    grad: float
    ms: float


def transformers(model: Any, ids: Tensor, temperature: float) -> Tensor:
    """The model's own logits, in float32 or wider."""
    logits = model(input_ids=ids).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0]


def ours(model: Any, ids: Tensor, temperature: float) -> Tensor:
    """`fuse_head`."""
    from aepo_kernels.integrations.transformers import label_logprobs

    found = label_logprobs(model, input_ids=ids, labels=ids, temperature=temperature)
    assert found.logprobs is not None
    return found.logprobs


def trl(model: Any, ids: Tensor, temperature: float) -> Tensor:
    """TRL's fused head."""
    from trl.trainer.utils import add_fused_lm_head  # type: ignore[import-not-found]

    add_fused_lm_head(model, temperature=temperature)
    return model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs


def verl(model: Any, ids: Tensor, temperature: float) -> Tensor:
    """verl's fused head for FSDP, which is given the weight only."""
    from verl.utils.experimental import torch_functional  # type: ignore[import-not-found]

    hidden = backbone_of(model)(input_ids=ids).last_hidden_state[:, :-1]
    head = torch_functional.FusedLinearForPPO()
    return head(hidden, model.get_output_embeddings().weight, ids[:, 1:], temperature)[0]


def prime_rl(model: Any, ids: Tensor, temperature: float) -> Tensor:
    """prime-rl's chunked head."""
    from prime_rl.trainer.models.layers import lm_head  # type: ignore[import-not-found]

    lm_head.inject_prime_lm_head(model, chunk_size=512)
    each = torch.full(ids[:, 1:].shape, temperature)
    labels = torch.roll(ids, -1, 1)[:, :-1]
    hidden = backbone_of(model)(input_ids=ids).last_hidden_state[:, :-1]
    return model.lm_head(hidden, labels, temperature=each)["logprobs"]


CANDIDATES: dict[str, Candidate] = {
    "ours": ours,
    "transformers": transformers,
    "trl": trl,
    "verl": verl,
    "prime-rl": prime_rl,
}


@contextmanager
def hidden_states(model: Any, states: Tensor) -> Any:
    """While the model's backbone gives these states [B, L, H], whatever it is called with."""

    def put(module: Any, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = states
        return output

    handle = backbone_of(model).register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def scores(
    candidate: Candidate, name: str, dtype: torch.dtype, states: Tensor, ids: Tensor, t: float
) -> tuple[Tensor, list[Tensor], float]:
    """Log-probs [B, L - 1], gradients by states and head, and milliseconds of a candidate.

    The model is that of tiny_model in float32 rounded to the dtype; for float64, to that of states.
    """
    model = tiny_model(name, dtype=states.dtype).to(dtype)
    given = states.detach().to(dtype).requires_grad_()
    parameters = list(model.get_output_embeddings().parameters())
    with hidden_states(model, given):
        before = time.perf_counter()
        logprobs = candidate(model, ids, t)
        upstream = torch.linspace(-1, 1, logprobs.numel(), dtype=logprobs.dtype)
        loss = (upstream.view_as(logprobs) * logprobs).sum()
        grads = torch.autograd.grad(loss, [given, *parameters], allow_unused=True)
        ms = 1000 * (time.perf_counter() - before)
    known = zip(grads, [given, *parameters], strict=True)
    return logprobs.detach(), [torch.zeros_like(p) if g is None else g for g, p in known], ms


def compare(name: str, dtype: torch.dtype, temperature: float) -> dict[str, Errors | str]:
    """The errors of each candidate on one model, or why it has none."""
    ids = torch.randint(3, VOCAB, (4, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = backbone_of(tiny_model(name, dtype=dtype))(input_ids=ids).last_hidden_state
    truth = scores(transformers, name, torch.float64, states, ids, temperature)
    size = max(grad.abs().max().item() for grad in truth[1])
    found: dict[str, Errors | str] = {}
    for label, candidate in CANDIDATES.items():
        try:
            scores(candidate, name, dtype, states, ids, temperature)  # the first call is slower
            logprobs, grads, ms = scores(candidate, name, dtype, states, ids, temperature)
        except Exception as error:  # of a peer's code
            if label == "ours":
                raise
            found[label] = " ".join(f"{type(error).__name__}: {error}".split())[:100]
            continue
        pairs = zip(grads, truth[1], strict=True)
        worst = max((left.double() - right).abs().max().item() for left, right in pairs)
        error = (logprobs.double() - truth[0]).abs().max().item()
        found[label] = Errors(error, worst / size, ms)
    return found


def is_off(found: dict[str, Errors | str], dtype: torch.dtype) -> bool:
    """Whether ours is further off than twice the model's own logits, and than the dtype rounds."""
    own, plain = found["ours"], found["transformers"]
    if not isinstance(own, Errors) or not isinstance(plain, Errors):
        return True
    # log-probs near 5, sums in float32; gradients rounded once to their dtype
    allowed = 1e-5, 4 * torch.finfo(dtype).eps
    pairs = zip(own[:2], plain[:2], allowed, strict=True)
    return not all(error <= 2 * other + least for error, other, least in pairs)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m aepo_kernels.integrations.check")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--ms", action="store_true", help="forward and backward, the second run")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    print(f"{options.dtype}: largest error of a log-prob [nats] / of a gradient [of the largest]")
    print("".join(f"{title:<22}" for title in ("model", *CANDIDATES)).rstrip())
    off, reasons = [], {}
    for name in MODELS:
        found = compare(name, dtype, options.temperature)
        off += [name] if is_off(found, dtype) else []
        cells = [name]
        for label, errors in found.items():
            if isinstance(errors, str):
                reasons[label] = errors
                cells.append("-")
                continue
            cells.append(f"{errors.logprob:.1e} / {errors.grad:.1e}")
            if options.ms:
                cells[-1] += f" {errors.ms:.1f}"
        print("".join(f"{cell:<22}" for cell in cells).rstrip())
    for label, reason in reasons.items():
        print(f"- {label}: {reason}")
    print(f"ours is off on {', '.join(off)}" if off else "ours is right on all of them")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
