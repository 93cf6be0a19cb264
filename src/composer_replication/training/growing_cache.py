"""Keys and values that are appended where they lie.

A `DynamicLayer` of transformers copies its whole cache for each sampled token.

Letters: B rows, H heads, T columns, D head size.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

SPARE_COLUMNS = 64
"""Allocated at a time: copies become that many times fewer, for the memory of half as many tokens
in each row."""


def let_grow(cache: DynamicCache) -> DynamicCache:
    """The same cache; its layers that keep every column append in place from now on."""
    cache.layers = [
        GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` with columns to spare; what it returns are views of its first ones."""

    def __init__(self) -> None:
        super().__init__()
        self._key_room = _Room()
        self._value_room = _Room()

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *_: Any,  # noqa: ANN401, those of other layers
        **__: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Append new columns, [B, H, n, D] each; returns all of them, [B, H, T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._key_room.appended(self.keys, key_states)
        self.values = self._value_room.appended(self.values, value_states)
        return self.keys, self.values


class _Room:
    """Of keys or of values: an allocation, and the view of it that was handed out last."""

    def __init__(self) -> None:
        self._whole: Tensor | None = None
        self._shown: Tensor | None = None

    def appended(
        self, states: Float[Tensor, "B H T D"] | None, new: Float[Tensor, "B H n D"]
    ) -> Float[Tensor, "B H T_n D"]:
        num_old = 0 if states is None or states.numel() == 0 else states.shape[-2]
        num_columns = num_old + new.shape[-2]
        # Whoever reorders or cuts a cache puts other tensors into its layers.
        is_own = self._whole is not None and states is self._shown
        if self._whole is None or not is_own or self._whole.shape[-2] < num_columns:
            columns = num_columns + SPARE_COLUMNS
            self._whole = new.new_empty((*new.shape[:-2], columns, new.shape[-1]))
            if states is not None and num_old:
                self._whole[..., :num_old, :] = states
        self._whole[..., num_old:num_columns, :] = new
        self._shown = self._whole[..., :num_columns, :]
        return self._shown
