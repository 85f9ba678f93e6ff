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
        self.dtype, self.device = layer.dtype, layer.device
        self.is_initialized = True
        self.room = room  # tokens that may still come
        self._take(layer.keys, layer.values, rows)

    def _take(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
        self._keys, self._values = (self._roomy(old, rows) for old in (keys, values))
        self._show(keys.shape[2])

    def _roomy(self, old: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        _, heads, length, width = old.shape
        new = old.new_empty(len(rows), heads, length + self.room, width)
        return new.index_copy_(2, torch.arange(length, device=old.device), old[rows])

    def _show(self, length: int) -> None:
        self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        self.room -= end - start
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._take(self.keys, self.values, indices)


def make_room(cache: DynamicCache, rows: torch.Tensor, room: int) -> None:
    """Keep `rows` of a cache, which may repeat, and grow in place by up to `room` tokens.

    Layers of a kind of their own, as those with sliding windows, only lose and repeat rows.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[index] = RoomyLayer(layer, rows, room)
        else:
            layer.batch_select_indices(rows)  # type: ignore[union-attr]
