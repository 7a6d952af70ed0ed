"""A cache that grows in place: new rows are written behind the others, which stay where they are.

The stock cache joins old and new rows anew at every step, so that a step of decoding copies all
keys and values of the prompt: thousands of rows where images are read (docs/log.md).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

__all__ = ["ROOM", "GrowingCache", "GrowingLayer", "extend_cache"]

ROOM = 64
"""How many more rows to make room for where there is none left."""


class Room:
    """Appends to the keys or the values of a layer, and knows the room behind them.

    Only the very tensor that was returned last has room; views of it, copies and what else takes
    its place in the layer are copied at the next call. So no row is written twice, and memory that
    is not shown any more is free.
    """

    def __init__(self) -> None:
        self._shown: weakref.ref[Tensor] | None = None
        self._capacity = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Room, ()  # copies of a cache have rows of their own, without room

    def append(self, old: Tensor, new: Tensor) -> Tensor:
        """What ``torch.cat`` gives of rows (B, H, past, h) and (B, H, N, h)."""
        leading, width = old.shape[:-2], old.shape[-1]
        if (new.shape[:-2], new.shape[-1], new.dtype, new.device) != (
            leading, width, old.dtype, old.device,
        ):  # fmt: skip
            return torch.cat([old, new], dim=-2)  # which promotes types, or says what is wrong
        past, length = old.shape[-2], old.shape[-2] + new.shape[-2]
        owned = self._shown is not None and self._shown() is old
        # Only inference mode may write into what inference mode has made.
        closed = old.is_inference() and not torch.is_inference_mode_enabled()
        if owned and length <= self._capacity and not closed:
            rows = old.as_strided((*leading, length, width), old.stride())
        else:
            self._capacity = length + ROOM
            rows = old.new_empty(*leading, self._capacity, width)[..., :length, :]
            rows[..., :past, :] = old
        rows[..., past:, :] = new
        self._shown = weakref.ref(rows)
        return rows


class GrowingLayer(DynamicLayer):
    """A layer of a `GrowingCache`: the stock layer with gradients, and while compiled.

    What ``update`` returns is a view of memory that later calls write to behind it. Autograd, which
    looks at memory as a whole, refuses a graph that holds such a view across a later call.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._key_room, self._value_room = Room(), Room()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, H, N, h) keys and values; returns those of all rows."""
        grows = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not grows or not self.get_seq_length():
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        assert self.keys is not None and self.values is not None, "there are rows"
        self.keys = self._key_room.append(self.keys, key_states)
        self.values = self._value_room.append(self.values, value_states)
        return self.keys, self.values


class GrowingCache(DynamicCache):
    """The stock dynamic cache, arguments and all, with layers that grow in place.

    Sliding windows stay stock, and so does a cache made without a configuration. What the model
    notes on it about the samples of the batch follows where samples are repeated or selected.

    Attributes:
        proxyv_left_out: rows of a reduced prompt that the first layer lacks; ``note_stages``.
        proxyv_full_rows: (B, past) which rows are full tokens; see ``remember_full_rows``.
        proxyv_stages: what decoding has to know of a reduced prompt; see ``note_stages``.
    """

    proxyv_left_out: int | None = None
    proxyv_full_rows: Tensor | None = None
    proxyv_stages: tuple[Any, ...] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for place, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[place] = GrowingLayer()
                vars(self.layers[place]).update(vars(layer))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample so many times."""
        super().batch_repeat_interleave(repeats)
        self._change_notes(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the samples of these numbers."""
        super().batch_select_indices(indices)
        self._change_notes(lambda rows: rows[indices.to(rows.device)])

    def _change_notes(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.proxyv_full_rows is not None:
            self.proxyv_full_rows = change(self.proxyv_full_rows)
        if self.proxyv_stages is not None:
            self.proxyv_stages = tuple(stage.change(change) for stage in self.proxyv_stages)


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
