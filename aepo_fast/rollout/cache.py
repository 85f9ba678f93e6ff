"""A key-value cache that grows in place, for attention that reads it where it lies."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, [rows, heads, tokens so far, D], within larger tensors."""

    keys: torch.Tensor  # type: ignore[assignment]
    values: torch.Tensor  # type: ignore[assignment]

    def __init__(self, layer: DynamicLayer, rows: torch.Tensor, room: int) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        keys, values = layer.keys, layer.values
        # transformers sets a layer's dtype up to 5.23; later ones have none.
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._keep(keys, values, rows, keys.shape[2] + room)

    def _keep(
        self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, capacity: int
    ) -> None:
        self._keys, self._values = (
            old.new_empty(len(rows), old.shape[1], capacity, old.shape[3]) for old in (keys, values)
        )
        self._show(keys.shape[2])
        self.keys.copy_(keys.index_select(0, rows))  # indexing takes number by number
        self.values.copy_(values.index_select(0, rows))

    def _show(self, length: int) -> None:
        self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._keep(self.keys, self.values, indices, self._keys.shape[2])


def make_room(cache: DynamicCache, rows: torch.Tensor, room: int) -> None:
    """Keep `rows` of a cache, which may repeat, and grow in place by up to `room` tokens.

    Layers of a kind of their own, as those with sliding windows, only lose and repeat rows.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[index] = RoomyLayer(layer, rows, room)
        else:
            layer.batch_select_indices(rows)  # type: ignore[union-attr]
