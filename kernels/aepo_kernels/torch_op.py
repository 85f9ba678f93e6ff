"""`linear_logprob` as an operator that torch.compile takes whole: aepo_kernels::linear_logprob.

Everything it saves for its backward pass has a static shape, [N].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aepo_kernels.backends import resolve_backend, row_kernels
from aepo_kernels.checks import check_problem
from aepo_kernels.head import logprob
from aepo_kernels.head.plan import direction_dtype
from aepo_kernels.head.scaling import scale_rows
from aepo_kernels.head.tokens import tokens_of
from aepo_kernels.problem import Problem
from aepo_kernels.ranges import take
from aepo_kernels.rows.interface import RowStats

_NUM_OUTPUTS = 4  # then come the statistics that backward needs
_DIRECTION = 17  # position of the argument


@torch.library.custom_op("aepo_kernels::linear_logprob", mutates_args=())
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    second_temperatures: Tensor | None,
    second_temperature: float | None,
    softcap: float | None,
    logit_scale: float,
    lora_scale: float,
    ignore_index: int | None,
    logits_dtype: torch.dtype | None,
    backend: str,
    chunk_tokens: int | None,
    direction: str | None,
) -> list[Tensor]:
    """Log-prob, entropy, lse and, with a second temperature, its log-prob; then row statistics.

    Every output is [N]. A temperature is the tensor [N], or the number where the tensor is None.
    direction: see `head.plan.direction_of`; the direction itself is the last output, [N, H].
    """
    problem = _problem(locals())
    if problem.features.autograd:
        raise ValueError("backend = 'reference': is no operator; use it outside of torch.compile")
    check_problem(problem)
    tokens, stats, along = logprob.forward(problem, direction)
    values = logprob.outputs(problem, tokens, stats)
    kept = [x for x in (stats.max_logit, stats.log_sum, stats.second_log_sum) if x is not None]
    saved = [problem.spread(x, tokens.positions) for x in kept]
    # No output may be another's memory.
    found = [x.clone() for x in (*values, *saved) if x is not None]
    return found if along is None else [*found, along]


@linear_logprob.register_fake
def _(hidden: Tensor, *rest: Any) -> list[Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    has_second = rest[7] is not None or rest[8] is not None
    made = [
        hidden.new_empty(hidden.shape[:1], dtype=dtype)
        for _ in range(_NUM_OUTPUTS + 3 if has_second else _NUM_OUTPUTS + 1)
    ]
    if rest[_DIRECTION - 1] is not None:
        made.append(hidden.new_empty(hidden.shape, dtype=direction_dtype(hidden)))
    return made


@torch.library.custom_op("aepo_kernels::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    grads: Sequence[Tensor],
    results: Sequence[Tensor],
    needs: Sequence[bool],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    second_temperatures: Tensor | None,
    second_temperature: float | None,
    softcap: float | None,
    logit_scale: float,
    lora_scale: float,
    ignore_index: int | None,
    logits_dtype: torch.dtype | None,
    backend: str,
    chunk_tokens: int | None,
) -> list[Tensor]:
    """Gradients of hidden, weight, bias, lora_a and lora_b, without those that are not needed."""
    problem = _problem(locals())
    tokens = tokens_of(problem)
    kept = [take(x, tokens.positions) for x in results]
    second = (None, None)
    if len(kept) > _NUM_OUTPUTS + 1:
        second = kept.pop(3), kept.pop()
    stats = RowStats(kept[0], kept[1], kept[3], kept[4], *second)
    padded = [*grads, *[None] * (_NUM_OUTPUTS - len(grads))]
    found = logprob.backward(problem, tokens, stats, padded, needs)
    return [x.contiguous() for x in found if x is not None]


@linear_logprob_backward.register_fake
def _(grads: Any, results: Any, needs: Sequence[bool], *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, need in zip(rest[:5], needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    tensors, ctx.numbers = _split(inputs)
    ctx.num_results = len(output)
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors[: -ctx.num_results]
    results = list(ctx.saved_tensors[-ctx.num_results :])
    *numbers, direction = ctx.numbers
    along: Tensor | None = None if direction is None else results.pop()
    num_outputs = _NUM_OUTPUTS if len(results) > _NUM_OUTPUTS + 1 else _NUM_OUTPUTS - 1
    nothing = [None] * (len(tensors) + len(ctx.numbers) - 5)
    if direction is not None and along is not None:
        grad = logprob.alone(direction, grads[:num_outputs])
        if grad is not None:
            targets, ignore_index = tensors[5], ctx.numbers[_IGNORE_INDEX]
            if ignore_index is not None:
                grad = grad.masked_fill(targets == ignore_index, 0)
            return scale_rows(along, grad, tensors[0].dtype), None, None, None, None, *nothing
    upstream = [
        torch.zeros_like(result) if grad is None else grad
        for grad, result in zip(grads[:num_outputs], results, strict=False)
    ]
    needs = list(ctx.needs_input_grad[:5])
    found = iter(linear_logprob_backward(upstream, results, needs, *_join(tensors, numbers)))
    gradients = [next(found) if need else None for need in needs]
    return *gradients, *nothing


linear_logprob.register_autograd(_backward, setup_context=_setup_context)


def _call(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call a function as it is, between two graphs of torch.compile.

    The kernels switch cuBLAS's sums while they run, run the caller's loss between GEMMs, and look
    at numbers: a graph can hold none of this.
    """
    return function(*arguments, **keywords)


uncompiled: Callable[..., Any] = torch.compiler.disable(_call)


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether torch.export is tracing: in torch 2.11, a graph takes torch's own answer for True."""
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result
def is_whole_graph() -> bool:
    """Whether torch.compile is tracing with fullgraph=True, where a broken graph is an error."""
    # torch has no public question for it. Without an answer, the graph is broken as elsewhere.
    translator = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx()
    return bool(getattr(translator, "one_graph", False))


@torch.compiler.assume_constant_result
def backend_names(backend: str, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """The backend and the row operations that run, as constants of the graph."""
    name = resolve_backend(backend, device_type, dtype)
    return name, row_kernels(device_type, dtype, name)


# Positions of the arguments that are no tensors; and of one in this list.
_NUMBERS = (7, 9, 10, 11, 12, 13, 14, 15, 16, _DIRECTION)
_IGNORE_INDEX = _NUMBERS.index(13)


def _split(inputs: tuple) -> tuple[list[Tensor | None], list[Any]]:
    tensors = [x for index, x in enumerate(inputs) if index not in _NUMBERS]
    return tensors, [inputs[index] for index in _NUMBERS]


def _join(tensors: Sequence[Tensor | None], numbers: list[Any]) -> list[Any]:
    joined = list(tensors)
    for index, number in zip(_NUMBERS, numbers, strict=False):  # the direction may be left out
        joined.insert(index, number)
    return joined


def _problem(arguments: dict[str, Any]) -> Problem:
    """The problem that an operator's arguments describe."""
    hidden: Tensor = arguments["hidden"]
    first, second = arguments["temperatures"], arguments["second_temperatures"]
    names = (
        "hidden",
        "weight",
        "targets",
        "bias",
        "softcap",
        "logit_scale",
        "ignore_index",
        "chunk_tokens",
        "logits_dtype",
        "lora_a",
        "lora_b",
        "lora_scale",
    )
    return Problem(
        **{name: arguments[name] for name in names},
        temperature=arguments["temperature"] if first is None else first,
        second_temperature=arguments["second_temperature"] if second is None else second,
        backend=resolve_backend(arguments["backend"], hidden.device.type, hidden.dtype),
    )
