"""A cache that grows in place: new rows are written behind the others, which stay where they are.

The stock cache joins old and new rows anew at every step, so that a step of decoding copies all
keys and values of the prompt: thousands of rows where images are read (docs/log.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

__all__ = ["ROOM", "GrowingCache", "GrowingLayer", "extend_cache"]

ROOM = 64
"""How many rows to make room for where there is none left."""


class Buffer:
    """Keys or values of a layer, with room behind the last row."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.shown: Tensor | None = None

    def append(self, old: Tensor, new: Tensor) -> Tensor:
        """What ``torch.cat`` gives; old rows that have room behind them are not copied.

        Args:
            old: (B, H, past, h). If it is not what was last shown, it is copied.
            new: (B, H, N, h).

        Returns:
            (B, H, past+N, h).
        """
        past, length = old.shape[-2], old.shape[-2] + new.shape[-2]
        memory = self.memory if old is self.shown else None
        # Only inference mode may write into what inference mode has made.
        closed = not torch.is_inference_mode_enabled()
        if memory is None or memory.shape[-2] < length or (closed and memory.is_inference()):
            memory = old.new_empty(*old.shape[:-2], length + ROOM, old.shape[-1])
            memory[..., :past, :] = old
        memory[..., past:length, :] = new
        self.memory, self.shown = memory, memory[..., :length, :]
        return self.shown

    def crop(self, old: Tensor | None, cropped: Tensor | None) -> None:
        """``cropped``, the first rows of ``old``, is shown from now on: its room is written to."""
        if old is self.shown:
            self.shown = cropped


class GrowingLayer(DynamicLayer):
    """A layer of a `GrowingCache`.

    With gradients, and while compiled, it is the stock layer. Unlike there, rows that were cut off
    by ``crop`` are written over, also in what ``update`` returned before.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._own_keys, self._own_values = Buffer(), Buffer()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, H, N, h) keys and values; returns those of all rows."""
        grows = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not grows or not self.get_seq_length():
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        assert self.keys is not None and self.values is not None, "there are rows"
        self.keys = self._own_keys.append(self.keys, key_states)
        self.values = self._own_values.append(self.values, value_states)
        return self.keys, self.values

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Cut off the last rows (see the stock layer); their room is used again."""
        keys, values = self.keys, self.values
        super().crop(*args, **kwargs)
        self._own_keys.crop(keys, self.keys)
        self._own_values.crop(values, self.values)

    def reset(self) -> None:
        """Forget all rows, and the room behind them."""
        super().reset()
        self._own_keys, self._own_values = Buffer(), Buffer()


class GrowingCache(DynamicCache):
    """The stock dynamic cache with layers that grow in place; sliding windows stay stock.

    Args:
        config: of the decoder.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)
        self.layers = [
            GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers
        ]


def extend_cache(
    cache: Cache, keys: Tensor, values: Tensor, layer_idx: int
) -> tuple[Tensor, Tensor]:
    """``cache.update``, which copies all it is given, without the copy where nothing is cached.

    Args:
        cache: any cache.
        keys: (B, H, N, h), which nothing else may write to afterwards.
        values: likewise.
        layer_idx: layer of the cache.

    Returns:
        Keys and values of all rows, (B, H, past+N, h) each, or longer for a static cache.
    """
    plain = type(cache) in (DynamicCache, GrowingCache) and not cache.offloading
    layer: Any = cache.layers[layer_idx] if plain and layer_idx < len(cache.layers) else None
    if type(layer) not in (DynamicLayer, GrowingLayer) or layer.get_seq_length():
        return cache.update(keys, values, layer_idx)
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return keys, values
