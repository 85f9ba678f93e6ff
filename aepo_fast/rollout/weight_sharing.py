"""Finds where an engine keeps each trained weight, so that both can live in one storage.

Inference engines fuse what checkpoints hold apart (q, k and v; gate and up), each model class in
its own way. Instead of knowing those ways, this watches the engine's own loader load the trained
weights once and notes what it copies where.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

Weights = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Placement:
    """One copy of the loader: from a view of a trained weight to a view of the engine's."""

    source: torch.Tensor
    target: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes that a copy writes."""
        return self.target.numel() * self.target.element_size()


@torch.no_grad()
def find_placements(
    load: Callable[[list[tuple[str, torch.Tensor]]], Any], weights: Weights
) -> dict[str, list[Placement]] | None:
    """Where `load` puts each of `weights`, by name; nothing is written.

    The engine must hold these very weights already. None where its tensors are not what the loader
    would write (packed, quantised or rearranged after loading), or where a weight is not copied
    whole: then only a full reload of the engine can be right.
    """
    recorder = _Recorder(weights)
    with recorder:
        load([(name, weight.detach()) for name, weight in weights])
    for name, weight in weights:
        copied = sum(place.source.numel() for place in recorder.found[name])
        if not copied or copied % weight.numel():
            return None
    return recorder.found if recorder.same else None


@torch.no_grad()
def share(weights: Weights, placements: dict[str, list[Placement]]) -> list[Placement]:
    """Make trained weights views of the engine's storage; returns the copies that stay necessary.

    A weight is shared where the engine holds all of it in one place, in its dtype and on its
    device; its old storage is freed.
    """
    remaining: list[Placement] = []
    for name, weight in weights:
        places = placements[name]
        target = places[0].target
        if (
            len(places) == 1
            and target.shape == weight.shape
            and target.dtype == weight.dtype
            and target.device == weight.device
            and target.is_contiguous()
        ):
            weight.data = target
        else:
            remaining += places
    return remaining


@torch.no_grad()
def copy(placements: Sequence[Placement]) -> None:
    """Bring the engine's tensors up to date, in one batched call."""
    if placements:
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            [place.target for place in placements], [place.source for place in placements]
        )


class _Recorder(TorchDispatchMode):
    """Notes copies out of the weights instead of doing them; everything else happens."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        by_address = sorted((w.data_ptr(), w.data_ptr() + w.nbytes, name) for name, w in weights)
        self.starts = [start for start, _, _ in by_address]
        self.by_address = by_address
        self.found: dict[str, list[Placement]] = {name: [] for name, _ in weights}
        self.same = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, source = args[:2]
            name = self._owner(source)
            if name is not None:
                self.found[name].append(Placement(source, target))
                self.same &= torch.equal(target, source.to(target.device, target.dtype))
                return target
        return func(*args, **(kwargs or {}))

    def _owner(self, tensor: torch.Tensor) -> str | None:
        address = tensor.data_ptr()
        at = bisect.bisect_right(self.starts, address) - 1
        if at < 0:
            return None
        _, end, name = self.by_address[at]
        return name if address < end else None
