"""What both functions take and give back: the arguments, checked once, and the output tuples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

TokenLoss = Callable[..., Any]
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class LogprobOutput(NamedTuple):
    """Per-token results of `linear_logprob`; tensors are [N], zero at ignored positions."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    second_logprob: Tensor | None
    backend: str


class TokenLossOutput(NamedTuple):
    """Results of `linear_token_loss`; `loss` has a gradient, the rest is detached.

    `active_rows` is the number of tokens that took part in the gradient GEMMs (0 without gradient).
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logprob: Tensor
    entropy: Tensor
    second_logprob: Tensor | None
    backend: str
    active_rows: int


@dataclass(frozen=True)
class Problem:
    """A head applied to hidden states: logits = softcap * tanh(scale * (h W^T + b) / softcap).

    hidden: [N, H]. weight: [V, H]. targets: [N], int64. bias: [V]. Temperatures: float or [N].
    active: [A], int64, tokens at which a loss has a gradient, or None for all.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    temperature: float | Tensor
    second_temperature: float | Tensor | None
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    ignore_index: int | None
    chunk_tokens: int | None
    backend: str
    logits_dtype: torch.dtype | None = None
    active: Tensor | None = None

    @property
    def stats_dtype(self) -> torch.dtype:
        """The dtype of row statistics and of gradient accumulation."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    def kept(self) -> Tensor | None:
        """Positions whose target counts, [M], or None if all do."""
        if self.ignore_index is None:
            return None
        # The count of kept tokens sizes every later buffer, so on CUDA this waits for the device.
        positions = (self.targets != self.ignore_index).nonzero().squeeze(1)
        return None if len(positions) == len(self.targets) else positions

    def spread(self, values: Tensor, positions: Tensor | slice | None) -> Tensor:
        """Per-token values [M] of the kept positions as [N], with zeros elsewhere."""
        if not isinstance(positions, Tensor):
            return values
        return values.new_zeros(len(self.targets)).index_copy(0, positions, values)


def take(values: Tensor, positions: Tensor | slice | None) -> Tensor:
    """Rows of `values` at some positions; all of them where `positions` is None."""
    if isinstance(positions, Tensor):
        return values.index_select(0, positions)
    return values if positions is None else values[positions]


def sum_losses(result: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Split what a token loss returned into its scalar and its metrics."""
    loss, metrics = result if isinstance(result, tuple) else (result, {})
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"token_loss returned {shape}: the loss of a chunk must be a scalar tensor, "
            "the sum over its tokens; add .sum()"
        )
    return loss.reshape(()), metrics


def check_problem(problem: Problem) -> None:
    """Raise ValueError naming argument, value, reason and fix; never waits for a GPU."""
    hidden, weight, targets = problem.hidden, problem.weight, problem.targets
    if hidden.ndim != 2:
        _fail("hidden", tuple(hidden.shape), "must be [N, H]", "flatten batch and time first")
    num_tokens, hidden_size = hidden.shape
    if weight.ndim != 2 or weight.shape[1] != hidden_size or weight.shape[0] == 0:
        _fail(
            "weight",
            tuple(weight.shape),
            f"must be [V, {hidden_size}]",
            "pass lm_head.weight as is",
        )
    if tuple(targets.shape) != (num_tokens,):
        _fail("targets", tuple(targets.shape), f"must be [{num_tokens}]", "one id per hidden row")
    if targets.dtype != torch.int64:
        _fail("targets", targets.dtype, "must be int64", "call .long()")
    bias = problem.bias
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        _fail(
            "bias", tuple(bias.shape), f"must be [{weight.shape[0]}]", "one value per row of weight"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            reason = (
                "float16 gradients underflow here"
                if tensor.dtype == torch.float16
                else ("unsupported dtype")
            )
            _fail(name, tensor.dtype, reason, "use bfloat16 or float32")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            _fail(name, tensor.device, f"hidden is on {hidden.device}", "move both to one device")
    _check_temperature("temperature", problem.temperature, hidden)
    if problem.second_temperature is not None:
        _check_temperature("second_temperature", problem.second_temperature, hidden)
    if problem.softcap is not None and not 0 < problem.softcap < math.inf:
        _fail("softcap", problem.softcap, "must be positive and finite", "use None for no cap")
    if not math.isfinite(problem.logit_scale):
        _fail("logit_scale", problem.logit_scale, "must be finite", "use 1.0 for no scale")
    _check_logits_dtype(problem)
    if problem.chunk_tokens is not None and problem.chunk_tokens < 1:
        _fail(
            "chunk_tokens", problem.chunk_tokens, "must be at least 1", "use None for the default"
        )
    if targets.device.type == "cpu":
        _check_targets(problem)


def check_token_tensors(problem: Problem, tensors: tuple[Tensor, ...]) -> None:
    """Raise ValueError for token tensors that do not have one detached row per token."""
    num_tokens = len(problem.targets)
    for index, tensor in enumerate(tensors):
        name = f"token_tensors[{index}]"
        if tensor.ndim == 0 or len(tensor) != num_tokens:
            _fail(name, tuple(tensor.shape), f"must have {num_tokens} rows", "one per hidden row")
        if tensor.requires_grad:
            _fail(name, "requires_grad", "it would get no gradient", "pass tensor.detach()")
        if tensor.device != problem.hidden.device:
            _fail(name, tensor.device, f"hidden is on {problem.hidden.device}", "move it there")


def _check_targets(problem: Problem) -> None:
    # On CUDA this would wait for the device; there torch's own gather traps a bad index.
    targets, vocab = problem.targets, problem.weight.shape[0]
    bad = (targets < 0) | (targets >= vocab)
    if problem.ignore_index is not None:
        bad &= targets != problem.ignore_index
    if bad.any():
        value = int(targets[bad][0])
        reason = f"outside [0, {vocab}) and not ignore_index = {problem.ignore_index}"
        _fail("targets", value, reason, "check the tokenizer against the head's vocabulary")


def check_active(problem: Problem) -> None:
    """Raise ValueError unless `active` holds positions of tokens, each once."""
    active = problem.active
    if active is None:
        return
    num_tokens = len(problem.targets)
    fix = "pass positions of tokens as int64 [A], each once"
    if active.ndim != 1 or active.dtype != torch.int64:
        _fail("active", (tuple(active.shape), active.dtype), "is no list of positions", fix)
    if active.device != problem.hidden.device:
        _fail("active", active.device, f"hidden is on {problem.hidden.device}", "move it there")
    if active.device.type == "cpu" and len(active):
        if not 0 <= int(active.min()) <= int(active.max()) < num_tokens:
            _fail("active", active.tolist()[:8], f"outside [0, {num_tokens})", fix)
        if len(active.unique()) != len(active):
            _fail("active", active.tolist()[:8], "a position stands there twice", fix)


def _check_logits_dtype(problem: Problem) -> None:
    dtype, hidden = problem.logits_dtype, problem.hidden
    if dtype is None or dtype == hidden.dtype:
        return
    if dtype != torch.float32 or hidden.dtype != torch.bfloat16:
        _fail(
            "logits_dtype", dtype, f"hidden is {hidden.dtype}", "use None, or float32 on bfloat16"
        )
    if not hidden.is_cuda:
        reason = f"{hidden.device} has no GEMM from bfloat16 to float32"
        _fail("logits_dtype", dtype, reason, "use None, or float32 hidden and weight")


def _check_temperature(name: str, value: float | Tensor, hidden: Tensor) -> None:
    fix = "pass a positive float or a tensor with one per token"
    if not isinstance(value, Tensor):
        if not 0 < value < math.inf:
            _fail(name, value, "must be positive and finite", fix)
        return
    if tuple(value.shape) != (len(hidden),):
        _fail(name, tuple(value.shape), f"must be a float or [{len(hidden)}]", fix)
    if not value.is_floating_point():
        _fail(name, value.dtype, "must be floating point", "call .float()")
    if value.requires_grad:
        _fail(name, "requires_grad", "temperatures get no gradient", "pass tensor.detach()")
    if value.device != hidden.device:
        _fail(name, value.device, f"hidden is on {hidden.device}", "move it there")
    if value.device.type == "cpu" and not bool(((value > 0) & value.isfinite()).all()):
        _fail(name, value[~((value > 0) & value.isfinite())][0].item(), "must be positive", fix)


def _fail(name: str, value: object, reason: str, fix: str) -> None:
    raise ValueError(f"{name} = {value}: {reason}; {fix}")
