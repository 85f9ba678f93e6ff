"""Counts the bytes of tensors that exist at once, while operations make and free them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Counts storages that operations inside this context make, fake ones of no memory too.

    unit: bytes to whose multiples each is rounded up, as an allocator does; torch's take 512 on a
    GPU and 64 on a CPU. live: bytes that exist now. peaks: the most of each segment, by its name,
    see `segment`; what is inside no segment has the name "".
    """

    def __init__(self, unit: int = 512) -> None:
        super().__init__()
        self.unit, self.live = unit, 0
        self.peaks: dict[str, int] = {"": 0}
        self._name = ""
        # What ends each entry is the end of its storage, so that no number is used twice.
        self._known: dict[int, int] = {}

    @property
    def peak(self) -> int:
        """The most bytes of all segments."""
        return max(self.peaks.values())

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave out tensors that are there already, such as weights."""
        for tensor in tensors:
            self._note(tensor, counted=False)

    def exclude(self, tensor: Tensor) -> None:
        """Leave out a tensor that was counted when it was made."""
        key = tensor.untyped_storage()._cdata
        self.live -= self._known.get(key, 0)
        self._known[key] = 0

    @contextmanager
    def segment(self, name: str) -> Iterator[None]:
        """Keep the peak of what happens inside under a name of its own."""
        before = self._name
        self.begin(name)
        try:
            yield
        finally:
            self.begin(before)

    def begin(self, name: str) -> None:
        """Keep the peak of what follows under a name of its own."""
        self._name = name
        self.peaks[name] = max(self.peaks.get(name, 0), self.live)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._note(value, counted=True)
        return out

    def _note(self, tensor: Tensor, *, counted: bool) -> None:
        if tensor.layout != torch.strided:  # sparse: two tensors that are seen themselves
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // self.unit) * self.unit if counted else 0
        self._known[key] = size
        self.live += size
        self.peaks[self._name] = max(self.peaks[self._name], self.live)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)
