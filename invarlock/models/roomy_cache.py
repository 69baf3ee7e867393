"""A cache of keys and values that are not copied as they grow.

transformers' own layers copy all that they have with every token: as much as the model's weights for a few dozen rows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in memory that has room for more."""

    keys: Tensor
    values: Tensor
    rooms: tuple[Tensor, Tensor]
    """The memory of both."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before, fresh = self.get_seq_length(), key_states.shape[-2]
        if before + fresh > self.rooms[0].shape[-2]:
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room.narrow(-2, before, fresh).copy_(states)
        self.keys, self.values = (room.narrow(-2, 0, before + fresh) for room in self.rooms)
        return self.keys, self.values


def make_room(cache: Any, length: int) -> None:
    """Give the layers of a cache room for ``length`` tokens, where they are transformers' plain ones."""
    for layer in cache.layers if type(cache) is DynamicCache else ():
        if type(layer) is DynamicLayer and layer.is_initialized:
            layer.__class__ = RoomyLayer
            layer.rooms = _room(layer.keys, length), _room(layer.values, length)


def _room(kept: Tensor, length: int) -> Tensor:
    """Memory for ``length`` tokens, of which the first are there."""
    made = kept.new_empty(*kept.shape[:-2], max(length, kept.shape[-2]), kept.shape[-1])
    made.narrow(-2, 0, kept.shape[-2]).copy_(kept)
    return made
