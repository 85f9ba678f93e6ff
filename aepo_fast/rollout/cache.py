"""Rows of a key-value cache: those that go on, those that part from another, and room to grow."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, [rows, heads, tokens so far, D], within larger tensors.

    most: rows that it has room for. room: tokens that it has room for besides those of `layer`.
    """

    keys: torch.Tensor  # type: ignore[assignment]
    values: torch.Tensor  # type: ignore[assignment]

    def __init__(self, layer: DynamicLayer, most: int, room: int) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        keys, values = layer.keys, layer.values
        # transformers sets a layer's dtype up to 5.23; later ones have none.
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        rows = torch.arange(len(keys), device=keys.device)
        self._keep(keys, values, rows, (most, keys.shape[2] + room))

    def _keep(
        self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, room: tuple[int, int]
    ) -> None:
        self._keys, self._values = (
            old.new_empty(room[0], old.shape[1], room[1], old.shape[3]) for old in (keys, values)
        )
        self._show(len(rows), keys.shape[2])
        self.keys.copy_(keys.index_select(0, rows))  # indexing takes number by number
        self.values.copy_(values.index_select(0, rows))

    def _show(self, rows: int, length: int) -> None:
        self.keys, self.values = self._keys[:rows, :, :length], self._values[:rows, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, _, start, _ = self.keys.shape
        self._show(rows, start + key_states.shape[2])
        self.keys[:, :, start:] = key_states
        self.values[:, :, start:] = value_states
        return self.keys, self.values

    def keep(self, rows: torch.Tensor, most: int) -> None:
        """Keep these rows alone, with room for `most`."""
        self._keep(self.keys, self.values, rows, (most, self._keys.shape[2]))

    def fork(self, parents: torch.Tensor) -> None:
        """Add copies of these rows behind the others, without moving those."""
        old, length = len(self.keys), self.keys.shape[2]
        self._show(old + len(parents), length)
        self.keys[old:] = self.keys[:old].index_select(0, parents)
        self.values[old:] = self.values[:old].index_select(0, parents)


def make_room(cache: DynamicCache, most: int, room: int) -> None:
    """Let a cache grow in place, to up to `most` rows and by up to `room` tokens.

    Layers of a kind of their own, as those with sliding windows, stay what they are.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[index] = RoomyLayer(layer, most, room)


def keep_rows(cache: DynamicCache, rows: torch.Tensor, most: int) -> None:
    """Keep these rows of a cache alone; what grows in place gets room for `most` rows."""
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.keep(rows, most)
        else:
            layer.batch_select_indices(rows)  # type: ignore[union-attr]


def fork_rows(cache: DynamicCache, parents: torch.Tensor, count: int) -> None:
    """Add copies of these rows behind a cache's `count` rows."""
    everyone = torch.cat([torch.arange(count, device=parents.device), parents])
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.fork(parents)
        else:
            layer.batch_select_indices(everyone)  # type: ignore[union-attr]
