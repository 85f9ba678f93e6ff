"""What a token loss must be: a sum over its tokens, and a function of what it is given alone.

A loss that is not would give numbers that depend on the sizes of chunks, and parameters that it
reads would get no gradient. Neither shows in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aepo_kernels.problem import sum_losses

# Roundings by which a derivative may change with the tokens beside its own; a mean over the chunk
# changes it by a factor.
_ROUNDINGS = 64
# Share of a loss by which the losses of its halves may miss it: sums of different lengths.
_SHARE = 1e-3

_known: set[Any] = set()  # losses that have passed, by `_identity`


def check_loss(
    loss_fn: Callable[..., Any], vectors: Sequence[Tensor | None], columns: Sequence[Tensor]
) -> None:
    """Raise ValueError unless the loss of a chunk is the sum of the losses of its halves.

    vectors: log-prob, entropy and second log-prob, [C] each. columns: [C, ...]. Compared are the
    derivatives by each of the vectors, and the loss. It is done once in a process for a function's
    code, with the strings and flags that it closes over: closures that are made anew at each step
    cost nothing. A loss that draws random numbers, or that takes no half of a chunk, is let pass.
    """
    first = vectors[0]
    assert first is not None
    count = len(first)
    if count < 2 or _is_capturing(first) or (identity := _identity(loss_fn)) in _known:
        return
    with torch.random.fork_rng([first.device] if first.is_cuda else []):
        whole = _evaluate(loss_fn, vectors, columns, slice(0, count))
        try:
            halves = [
                _evaluate(loss_fn, vectors, columns, half)
                for half in (slice(0, count // 2), slice(count // 2, count))
            ]
        except Exception:  # a size is built in: with several chunks, the loss fails by itself
            return
        again = _evaluate(loss_fn, vectors, columns, slice(0, count))
    if not _same(whole, again):
        return
    parts = torch.cat([half.derivatives for half in halves], 1)
    informative = bool(whole.derivatives.any()) or bool(whole.loss != 0)
    for wholes, others in zip(whole.derivatives, parts, strict=True):
        if (token := worst_difference(wholes, others)) is not None:
            what = f"token {token} of {count} has the derivative {float(wholes[token]):.6g}"
            _fail(f"{what} beside all of them and {float(others[token]):.6g} beside its half")
    sums = halves[0].loss + halves[1].loss
    scale = sum(float(x.loss.abs()) for x in (whole, *halves))
    scale += float(whole.derivatives.abs().sum())
    near = abs(float(sums - whole.loss)) <= _SHARE * scale
    if bool(whole.loss.isfinite()) and not near:
        _fail(
            f"{count} tokens have the loss {float(whole.loss):.6g}, their halves {float(sums):.6g}"
        )
    if informative:
        _known.add(identity)


def check_closure(loss: Tensor, vectors: Sequence[Tensor | None]) -> None:
    """Raise ValueError where a loss's graph reaches parameters, which would get no gradient.

    vectors: what the loss was given: leaves, or results of other functions.
    """
    given = [vector for vector in vectors if vector is not None]
    ends = {vector.grad_fn for vector in given if vector.grad_fn is not None}
    found: list[Tensor] = []
    waiting, seen = [loss.grad_fn], set(ends)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of a leaf's AccumulateGrad alone
        if variable is not None and not any(variable is vector for vector in given):
            found.append(variable)
        waiting += [following for following, _ in node.next_functions]
    if found:
        shapes = ", ".join(str(list(variable.shape)) for variable in found[:4])
        raise ValueError(
            f"token_loss reads tensors that require a gradient, of shapes {shapes}: they would get "
            "none; detach() them, or use linear_logprob and a loss of its outputs"
        )


def worst_difference(whole: Tensor, parts: Tensor, *, least: float = 0.0) -> int | None:
    """The position at which two vectors, [C], differ most, None where they differ by roundings.

    Roundings are those of the largest number in `whole`, or of `least` where that is larger. What
    is not finite in both is equal.
    """
    difference = torch.where(whole == parts, 0.0, (parts - whole).abs())
    difference = torch.where(whole.isfinite() | parts.isfinite(), difference, 0.0)
    size = torch.where(whole.isfinite(), whole.abs(), 0.0).max().clamp(min=least)
    limit = _ROUNDINGS * torch.finfo(whole.dtype).eps * size
    if bool((difference <= limit).all()):
        return None
    return int(difference.nan_to_num(torch.inf).argmax())


class _Values(NamedTuple):
    loss: Tensor  # []
    derivatives: Tensor  # [2 or 3, C], by the vectors


def _evaluate(
    loss_fn: Callable[..., Any],
    vectors: Sequence[Tensor | None],
    columns: Sequence[Tensor],
    tokens: slice,
) -> _Values:
    """The loss of some tokens of a chunk and its derivatives, on copies of their numbers."""
    leaves = [None if x is None else x.detach()[tokens].clone().requires_grad_() for x in vectors]
    with torch.enable_grad():
        loss, _ = sum_losses(loss_fn(*leaves, *(column[tokens].clone() for column in columns)))
    used = [leaf for leaf in leaves if leaf is not None]
    found: Sequence[Tensor | None] = [None] * len(used)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, used, allow_unused=True)
    rows = [torch.zeros_like(x) if y is None else y for x, y in zip(used, found, strict=True)]
    return _Values(loss.detach(), torch.stack(rows))


def _same(one: _Values, other: _Values) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True))


def _fail(what: str) -> None:
    raise ValueError(
        f"token_loss is no sum over tokens: {what}, so its result would depend on the sizes of "
        "chunks; use .sum(), with a weight of each token in place of .mean(), and nothing of other "
        "tokens"
    )


def _identity(loss_fn: Callable[..., Any]) -> Any:
    """What makes two function objects the same loss: code, and the strings and flags beside it."""
    return _code_of(loss_fn, getattr(loss_fn, "__dict__", {}))


def _code_of(function: Any, attributes: Mapping[str, Any], depth: int = 3) -> Any:
    """Code with the plain values of what a callable holds, to a depth: closures may be circular."""
    if isinstance(function, partial):
        held = [function.func, *function.args, *function.keywords.values()]
        return tuple(_plain(value, depth) for value in held)
    code = getattr(function, "__code__", type(function))
    owner = getattr(function, "__self__", None)  # of a method
    held = [*attributes.values(), *getattr(owner, "__dict__", {}).values()]
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # the cell is empty as yet
            held.append(cell.cell_contents)
    held += [*(getattr(function, "__defaults__", None) or ())]
    held += [*(getattr(function, "__kwdefaults__", None) or {}).values()]
    return code, *(_plain(value, depth) for value in held)


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, (str, bool, Enum)):
        return value
    if depth and (isinstance(value, partial) or hasattr(value, "__code__")):
        return _code_of(value, {}, depth - 1)
    return type(value)


def _is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, in which nothing can be compared."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
