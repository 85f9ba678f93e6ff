"""Optimizers whose state lies in CPU memory, for good or while the GPU is needed for sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from aepo_fast.training.optim import MasterAdamW, MuonAndAdamW

PART_BYTES = 2**28  # of parameters whose state is on the device at once during a step


class OffloadedOptimizer:
    """An optimizer whose state, float32 copies of weights included, can lie in CPU memory.

    A step from there brings the state of some parameters at a time to their device and back. Thus
    it is the very step that the optimizer takes without this, bit for bit and for each optimizer.
    ZeRO-Offload (arXiv 2101.06840) steps on the CPU instead, which moves 8 bytes a parameter where
    this moves 16 for AdamW, and depends on the processor's cores. Clipping sees all gradients at
    once, which stay on the device.
    """

    def __init__(self, inner: torch.optim.Optimizer, *, part_bytes: int = PART_BYTES) -> None:
        self.inner, self.part_bytes = inner, part_bytes
        self.away = False  # whether the state lies in CPU memory
        self._host: dict[Tensor, dict[str, Tensor]] = {}  # kept once made: pinning takes long
        self._masters: dict[Tensor, Tensor] = {}  # copies of weights -> where they lie

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own."""
        return self.inner.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients."""
        self.inner.zero_grad(set_to_none)

    def to_cpu(self) -> None:
        """Take the state to CPU memory, pinned beside a GPU, until `to_device`."""
        if not self.away:
            self._store(self._parameters())
            self.away = True

    def to_device(self) -> None:
        """Bring all of the state back to the parameters."""
        if self.away:
            self._fetch(self._parameters())
            self.away = False

    @torch.no_grad()
    def step(self) -> None:
        """The optimizer's step, of some parameters after the others where the state is away."""
        if not self.away:
            self.inner.step()
            return
        whole = self.inner.param_groups
        try:
            for group in whole:
                for part in _parts(group["params"], self.part_bytes):
                    self.inner.param_groups = [{**group, "params": part}]
                    self._fetch(part)
                    self.inner.step()
                    self._store(part)
        finally:
            self.inner.param_groups = whole

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own, wherever its state lies."""
        state = self.inner.state_dict()
        if self.away and "masters" in state:
            state["masters"] = [self._masters[one] for one in state["masters"]]
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, to CPU memory where the state lies there."""
        if not self.away:
            self.inner.load_state_dict(state_dict)
            return
        # Left to the optimizer, all of it would be on the device for a moment.
        groups = {"state": {}, "param_groups": state_dict["param_groups"]}
        torch.optim.Optimizer.load_state_dict(self.inner, groups)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, number in zip(group["params"], saved["params"], strict=True):
                entries = state_dict["state"].get(number, {})
                self._host[parameter] = {
                    name: _copied(value, pinned=parameter.is_cuda)
                    for name, value in entries.items()
                    if _moves(value)
                }
                # As torch places what stays: counters beside the parameters of fused steps.
                rest = {
                    name: value.to(parameter.device) if group.get("fused") else value
                    for name, value in entries.items()
                    if not _moves(value)
                }
                if entries:
                    self.inner.state[parameter] = rest | self._host[parameter]
        for master, saved in zip(self._masters, state_dict.get("masters", ()), strict=True):
            self._masters[master].copy_(saved)

    def _parameters(self) -> list[Tensor]:
        return [one for group in self.param_groups for one in group["params"]]

    def _store(self, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            entries: dict[str, Any] = self.inner.state.get(parameter, {})
            host = self._host.setdefault(parameter, {})
            for name, value in entries.items():
                if _moves(value):
                    entries[name] = host[name] = _stored(value, host.get(name))
            if isinstance(self.inner, MasterAdamW):
                self._masters[parameter] = _stored(parameter, self._masters.get(parameter))
                # It keeps shape, dtype and device, by which gradients are checked, in 4 bytes.
                parameter.data = parameter.new_zeros(()).expand(parameter.shape)
        self._wait()  # a checkpoint reads it without the GPU

    def _fetch(self, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            entries: dict[str, Any] = self.inner.state.get(parameter, {})
            for name, value in entries.items():
                if _moves(value):
                    entries[name] = _map(value, lambda one, to=parameter.device: _sent(one, to))
            if parameter in self._masters:
                parameter.data = _sent(self._masters[parameter], parameter.device)

    def _wait(self) -> None:
        if any(one.is_cuda for one in self._parameters()):
            torch.cuda.synchronize()


def offloaded(
    optimizer: torch.optim.Optimizer, *, part_bytes: int = PART_BYTES
) -> tuple[torch.optim.Optimizer, list[OffloadedOptimizer]]:
    """The same optimizer with a state that can lie in CPU memory, and the parts that hold it."""
    many: Any = optimizer
    if isinstance(optimizer, MuonAndAdamW):
        parts = [OffloadedOptimizer(one, part_bytes=part_bytes) for one in (many.muon, many.adamw)]
        many.muon, many.adamw = parts
        return optimizer, parts
    one: Any = OffloadedOptimizer(optimizer, part_bytes=part_bytes)
    return one, [one]


def _parts(parameters: Sequence[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Parameters in order, of `most` bytes together or one alone."""
    part: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if part and size + parameter.nbytes > most:
            yield part
            part, size = [], 0
        part.append(parameter)
        size += parameter.nbytes
    if part:
        yield part


def _moves(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0  # a counter stays


def _stored(value: Tensor, host: Tensor | None) -> Tensor:
    """What a value is, in the CPU memory that it had before."""
    if host is None:
        return _copied(value, pinned=value.is_cuda)
    for source, target in zip(_leaves(value), _leaves(host), strict=True):
        target.copy_(source, non_blocking=True)
    return host


def _copied(value: Tensor, *, pinned: bool) -> Tensor:
    def copy(one: Tensor) -> Tensor:
        return torch.empty_like(one, device="cpu", pin_memory=pinned).copy_(one, non_blocking=True)

    return _map(value.detach(), copy)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True, copy=True)


def _leaves(value: Tensor) -> list[Tensor]:
    """The tensors that a tensor consists of: torchao's hold codes and scales."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    return [getattr(value, name) for name in value.__tensor_flatten__()[0]]


def _map(value: Tensor, change: Any) -> Tensor:
    if not is_traceable_wrapper_subclass(value):
        return change(value)
    kind: Any = type(value)
    names, context = value.__tensor_flatten__()
    inner = {name: change(getattr(value, name)) for name in names}
    return kind.__tensor_unflatten__(inner, context, value.shape, value.stride())
