"""Which tensors the kernels can read, and what may not be around them: asked before any work.

The C++ and Triton kernels get addresses. A tensor without memory of its own would end the process,
and a transform that torch applies from outside would be left out of the result without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_P = ParamSpec("_P")
_R = TypeVar("_R")

_NO_DISPATCH = getattr(Tensor, "__torch_dispatch__", None)
# Plain tensors whose memory is known to be there.
_PLAIN = (Tensor, torch.nn.Parameter)
_WRAPPER = (
    "wraps other tensors; pass full_tensor(), or to_local() with "
    "shard=VocabShard.from_dtensor(weight), or call this inside the module's forward, where FSDP "
    "has gathered the weight"
)

_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
_keys = torch._C._dispatch_keys  # pyright: ignore[reportPrivateImportUsage]


def _plain_keys() -> set[int]:
    """What torch's dispatcher asks of an ordinary tensor of the CPU, and of one of inference."""
    with torch.inference_mode():
        inference = torch.empty(0, device="cpu")
    return {_keys(tensor).raw_repr() for tensor in (torch.empty(0, device="cpu"), inference)}


_PLAIN_KEYS = _plain_keys()


def check_readable(**arguments: object) -> None:
    """Raise ValueError for a tensor that the kernels cannot read, by its name.

    None is skipped but for hidden, weight and targets. A tensor subclass with memory of its own is
    read like any tensor.
    """
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        raise ValueError(
            "torch.jit.trace: would record the kernels of these numbers only; use torch.export"
        )
    for name, value in arguments.items():
        if value is None and name not in ("hidden", "weight", "targets"):
            continue
        if (reason := unreadable_reason(value)) is not None:
            raise ValueError(f"{name} = {describe(value)}: {reason}")


def unreadable_reason(value: object) -> str | None:
    """Why the kernels cannot read an argument, and what to pass; None for a tensor that they can.

    It looks at the tensor's kind and at the transforms around it, never at its numbers.
    """
    if not isinstance(value, Tensor):
        return "is no tensor; pass a torch.Tensor"
    has_dual = forward_ad._current_level >= 0
    if type(value) in _PLAIN and not has_dual and _keys(value).raw_repr() in _PLAIN_KEYS:
        return None  # in less than a microsecond
    if type(value) not in _PLAIN and (reason := _unreadable_kind(value)) is not None:
        return reason
    if value.is_nested or value.layout != torch.strided:
        return "is not laid out in rows and columns; pass a dense tensor, as to_dense() or values()"
    if value.is_quantized:
        return "is quantised; pass dequantize()"
    if value.is_neg() or value.is_conj() or value._is_zerotensor():
        return "stands for other numbers than lie in its memory; pass resolve_neg().clone()"
    if _functorch.peek_interpreter_stack() is not None:
        if _functorch.is_functorch_wrapped_tensor(value):
            return "is inside a transform of torch.func; use torch.autograd.grad and a loop"
    elif torch._is_functional_tensor(value):  # pyright: ignore[reportPrivateImportUsage]
        return "is being traced; call the kernels outside of it, or use torch.compile"
    if has_dual and forward_ad.unpack_dual(value).tangent is not None:
        return "has a tangent, and there is no forward-mode derivative; use backward()"
    return None


def rows_of_dtensor(weight: object) -> tuple[int, Any]:
    """The first row that this rank has of a DTensor [V, H], and the process group of its mesh.

    Raises ValueError unless the rows are split over a mesh of one dimension, so that every rank has
    some.
    """
    from torch.distributed.tensor import DTensor  # most callers have none

    def fail(reason: str, fix: str) -> NoReturn:
        raise ValueError(f"weight = {describe(weight)}: {reason}; {fix}")

    if not isinstance(weight, DTensor):
        fail("is no DTensor", "pass VocabShard(start, vocab, group)")
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1:
        reason = f"lies on a mesh of {mesh.ndim} dimensions"
        fail(reason, "redistribute it to the mesh of tensor parallelism alone")
    if not placements[0].is_shard(0):
        fix = "redistribute it to [Shard(0)], or pass full_tensor() without a shard"
        fail(f"is placed as {placements[0]}, not split by rows", fix)
    vocab, size = weight.shape[0], mesh.size()
    each = -(-vocab // size)  # rows of every rank but the last ones
    if each * (size - 1) >= vocab:
        fail(f"{vocab} rows leave one of {size} ranks without any", "use fewer ranks")
    start = mesh.get_local_rank() * each
    count = len(weight.to_local())
    if count != min(each, vocab - start):
        reason = f"has {count} rows here, not the {min(each, vocab - start)} of an even split"
        fail(reason, "pass VocabShard(start, vocab, group)")
    return start, mesh.get_group()


def _unreadable_kind(value: Tensor) -> str | None:
    """`unreadable_reason` for a subclass of Tensor."""
    if torch.nn.parameter.is_lazy(value):
        return "has no memory yet; run the module once, so that its parameters get their shapes"
    if is_traceable_wrapper_subclass(value):
        return _WRAPPER
    # Without `__torch_dispatch__` of its own, a subclass is an ordinary tensor with another name.
    dispatch = getattr(type(value), "__torch_dispatch__", None)
    if dispatch is not _NO_DISPATCH and not _has_memory(value):
        return "has no memory of its own; pass the tensor that it stands for"
    return None


def _has_memory(value: Tensor) -> bool:
    try:
        storage = value.untyped_storage()
        return storage.device == value.device and (storage.data_ptr() != 0 or not value.numel())
    except RuntimeError:  # there is no storage, or none with an address
        return False


def is_traced(*tensors: object) -> bool:
    """Whether torch.compile, torch.export, make_fx or FakeTensorMode records what happens here."""
    if torch.compiler.is_compiling():
        return True
    keys = torch._C._TorchDispatchModeKey  # pyright: ignore[reportPrivateImportUsage]
    modes = keys.FAKE, keys.PROXY, keys.FUNCTIONAL
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in modes):
        return True
    fake = torch._subclasses.FakeTensor  # pyright: ignore[reportAttributeAccessIssue]
    return any(isinstance(tensor, fake) for tensor in tensors)


def is_fake(tensor: object) -> bool:
    """Whether a tensor has a shape and no numbers, inside a FakeTensorMode, where none are read."""
    fake = torch._subclasses.FakeTensor  # pyright: ignore[reportAttributeAccessIssue]
    mode = torch._C._TorchDispatchModeKey.FAKE  # pyright: ignore[reportPrivateImportUsage]
    return isinstance(tensor, fake) and torch._C._get_dispatch_mode(mode) is not None


def breaks_graph(
    *options: str, traced: Callable[..., Any] | None = None
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate a function that torch.compile must call as it is, between two graphs.

    options: break the graph only where one of these keyword arguments is given; none: always. A
    graph that cannot be broken (fullgraph=True, torch.export, make_fx, FakeTensorMode) holds
    `traced`, called with the same arguments, or raises without it.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(function)
        def call(*arguments: _P.args, **keywords: _P.kwargs) -> _R:
            apart = not options or any(
                keywords.get(name) is not None and keywords.get(name) is not False
                for name in options
            )
            if not apart:
                return function(*arguments, **keywords)
            if torch.compiler.is_compiling():
                from aepo_kernels import torch_op  # registering operators imports much of torch

                whole = torch_op.is_exporting() or (traced and torch_op.is_whole_graph())
                if not whole:
                    return torch_op.uncompiled(function, *arguments, **keywords)
            if is_traced(*arguments, *keywords.values()):
                if traced is not None:
                    return traced(*arguments, **keywords)
                what = f" with {' or '.join(options)}" if options else ""
                raise ValueError(
                    f"{function.__name__}{what}: its work depends on numbers, so it cannot be "
                    "traced; call it outside of torch.export, make_fx and FakeTensorMode"
                )
            return function(*arguments, **keywords)

        return call

    return decorate


def first_order(what: str, instead: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the backward of an autograd function that has no second derivative.

    It raises RuntimeError where the gradient itself should be differentiable (create_graph=True):
    whoever differentiates it again would miss a term. what: the public function. instead: what to
    do about it.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def call(ctx: Any, *grads: Tensor | None) -> Any:
            if torch.compiler.is_compiling():  # compiled autograd
                from aepo_kernels import torch_op

                return torch_op.uncompiled(call, ctx, *grads)
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{what}: backward ran with create_graph=True, but its gradient has no "
                    f"derivative; {instead}"
                )
            known = [_in_memory(grad) for grad in grads if grad is not None]
            for grad in known:
                # torch's older vmap, of is_grads_batched, has no other sign.
                batched = "Batched" in str(_keys(grad))
                reason = "is a batch of vmap; use a loop" if batched else unreadable_reason(grad)
                if reason is not None and not is_fake(grad):
                    raise RuntimeError(f"{what}: the gradient by its result {reason}")
            rest = iter(known)
            return backward(ctx, *(None if grad is None else next(rest) for grad in grads))

        return call

    return decorate


def _in_memory(grad: Tensor) -> Tensor:
    """A gradient as autograd may bring it: negated as it is read, or zeros without memory."""
    if grad._is_zerotensor():
        return torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device)
    return grad.resolve_neg()


@contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """A context in which a graph that is differentiated at once keeps its tensors to itself.

    Without it, a checkpoint around the caller would compute the whole call again for each chunk's
    loss, and `save_on_cpu` would carry the vectors of the loss to the CPU and back.
    """
    if _saved_tensor_hooks() is None:
        yield
        return
    # A saved result that were kept as it is would hold its own graph.
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor):
        yield


def _saved_tensor_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]


def is_recomputed() -> bool:
    """Whether a checkpoint (use_reentrant=False) runs this a second time, in its backward pass."""
    hooks = _saved_tensor_hooks()
    return hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")


def describe(value: object) -> str:
    """An argument in few words: its type, and a tensor's shape where it has one."""
    if not isinstance(value, Tensor):
        return repr(value)[:40]
    try:
        return f"{type(value).__name__} {tuple(value.shape)}"
    except RuntimeError:  # a lazy parameter's shape is not known, nor is a nested tensor's
        return type(value).__name__
