"""Materialised log-probs and gradients by torch autograd: truth in float64, baseline in any dtype.

Written apart from aepo_kernels. A kernel passes if its error against float64 is at most twice that
of the materialised path in the same dtype, the tolerance that any rewrite of the sums needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Case:
    """Inputs of a head. options: keyword arguments of the kernels other than tensors below."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def keywords(self) -> dict[str, Any]:
        return self.options if self.bias is None else {**self.options, "bias": self.bias}

    def to(self, device: torch.device | str) -> Case:
        """The same case on another device."""
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        bias = None if self.bias is None else self.bias.to(device)
        return Case(
            self.hidden.to(device), self.weight.to(device), self.targets.to(device), bias, options
        )

    def fresh(self, dtype: torch.dtype | None = None) -> Case:
        """A copy whose tensors are leaves that require gradients, in `dtype` if given."""

        def leaf(x: Tensor) -> Tensor:
            return x.detach().clone().to(dtype or x.dtype).requires_grad_()

        bias = None if self.bias is None else leaf(self.bias)
        return replace(self, hidden=leaf(self.hidden), weight=leaf(self.weight), bias=bias)


OPTIONS = (
    "plain",
    "temperature",
    "token_temperature",
    "second",
    "token_second",
    "bias",
    "softcap",
    "scale",
    "ignored",
    "shift_up",
    "shift_down",
    "all",
)


def make_case(
    num_tokens: int,
    hidden_size: int,
    vocab: int,
    *,
    dtype: torch.dtype = torch.float32,
    option: str = "plain",
    seed: int = 0,
) -> Case:
    """Random inputs with logits of standard deviation about 2 and the named option switched on."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=rng)
    weight = torch.randn(vocab, hidden_size, generator=rng) * (2 / hidden_size**0.5)
    targets = torch.randint(vocab, (num_tokens,), generator=rng)
    token_temperature = torch.rand(num_tokens, generator=rng) + 0.5
    bias = torch.randn(vocab, generator=rng)
    options: dict[str, Any] = {}
    chosen = {option}
    if option == "all":
        chosen = {"token_temperature", "token_second", "bias", "softcap", "scale", "ignored"}
    if "temperature" in chosen:
        options["temperature"] = 0.7
    if "token_temperature" in chosen:
        options["temperature"] = token_temperature
    if "second" in chosen:
        options["second_temperature"] = 1.3
    if "token_second" in chosen:
        options["second_temperature"] = token_temperature.flip(0) + 0.25
    if "softcap" in chosen:
        options["softcap"] = 5.0
    if "scale" in chosen:
        options["logit_scale"] = 0.6
    if "ignored" in chosen:
        targets[torch.rand(num_tokens, generator=rng) < 0.4] = IGNORED
    if "shift_up" in chosen or "shift_down" in chosen:
        # A constant in every logit, carried by the first hidden dimension through the GEMM.
        hidden[:, 0] = 1.0
        weight[:, 0] = 200.0 if "shift_up" in chosen else -200.0
    return Case(
        hidden.to(dtype),
        weight.to(dtype),
        targets,
        bias.to(dtype) if "bias" in chosen else None,
        options,
    )


def materialised(case: Case) -> list[Tensor | None]:
    """logprob, entropy, lse, second_logprob, [N], from all logits; the GEMM in the case's dtype."""
    wide = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    keep = case.targets != case.options.get("ignore_index", IGNORED)
    index = torch.where(keep, case.targets, 0)[:, None]
    logits = (case.hidden @ case.weight.T).to(wide)
    if case.bias is not None:
        logits = logits + case.bias.to(wide)
    logits = logits * case.options.get("logit_scale", 1.0)
    cap = case.options.get("softcap")
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)

    def tempered(temperature: float | Tensor) -> Tensor:
        if isinstance(temperature, Tensor):
            return logits / temperature.to(wide)[:, None]
        return logits / temperature

    first = tempered(case.options.get("temperature", 1.0))
    distribution = torch.log_softmax(first, -1)
    outputs: list[Tensor | None] = [
        distribution.gather(1, index)[:, 0],
        torch.special.entr(distribution.exp()).sum(-1),
        first.logsumexp(-1),
        None,
    ]
    second = case.options.get("second_temperature")
    if second is not None:
        outputs[3] = torch.log_softmax(tempered(second), -1).gather(1, index)[:, 0]
    return [None if x is None else x.where(keep, 0.0) for x in outputs]


def output_weights(num_tokens: int, *, seed: int = 1) -> list[Tensor]:
    """Random upstream gradients of the four outputs."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(num_tokens, generator=rng) for _ in range(4)]


def weighted_gradients(
    case: Case, outputs: Sequence[Tensor | None], weights: Sequence[Tensor | None]
) -> list[Tensor]:
    """Gradients of sum_k weights_k . outputs_k by hidden, weight and bias."""
    pairs = zip(outputs, weights, strict=True)
    terms = [(w * x).sum() for x, w in pairs if x is not None and w is not None]
    return list(torch.autograd.grad(torch.stack(terms).sum(), case.tensors()))


def assert_as_accurate(actual: Tensor, baseline: Tensor, truth: Tensor, what: str) -> None:
    """Largest error at most twice the baseline's, plus four float32 roundings of the largest value.

    The floor is for sums where the baseline happens to round nowhere.
    """
    assert actual.shape == truth.shape, what
    if actual.numel() == 0:
        return
    assert actual.isfinite().all(), f"{what}: not finite"
    error = (actual.double() - truth).abs().max().item()
    allowed = 2 * (baseline.double() - truth).abs().max().item()
    floor = 4 * torch.finfo(torch.float32).eps * max(1.0, truth.abs().max().item())
    assert error <= allowed + floor, f"{what}: error {error:.3g} > {allowed:.3g} + {floor:.3g}"
