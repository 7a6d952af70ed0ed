"""Which rows are real and which are cached, as attention masks and caches tell it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from proxyv.model.layout import SequenceLayout
from proxyv.reduction.rows import count_positions

__all__ = ["Window", "past_length", "plain_rows", "real_rows", "remember_full_rows"]


@dataclass(frozen=True)
class Window:
    """Which rows are real, of the new rows and of the cached ones.

    Attributes:
        real: (B, S) bool, the new rows.
        past_valid: (B, past) bool, the cached rows.
        left_padded: some row of the batch has padding before a real row.
    """

    real: Tensor
    past_valid: Tensor
    left_padded: bool

    @classmethod
    def build(cls, embeds: Tensor, attention_mask: Tensor | None, past: int) -> Window:
        """Read a mask (B, past + S) of the new rows (B, S, D) and the ``past`` cached ones.

        Raises:
            ValueError: a prepared mask, or one that is too short.
        """
        B, S, _ = embeds.shape
        if attention_mask is None:
            real = torch.ones(B, S, dtype=torch.bool, device=embeds.device)
            return cls(real, real.new_ones(B, past), False)
        mask = _covered(attention_mask, past, S).to(embeds.device).bool()
        left = bool((mask[:, 1:] & ~mask[:, :-1]).any())
        return cls(mask[:, past:], mask[:, :past], left)

    @property
    def needs_mask(self) -> bool:
        """Whether causal attention alone would show a real row something it must not see."""
        return self.left_padded or self.past_valid.shape[1] > 0

    def position_ids(self) -> Tensor:
        """(B, S) positions counted over real tokens only, as generation counts them.

        Padding that no real row can see is counted on, since positions that stand still read to
        transformers like several sequences in one row, for which it would build a mask.
        """
        if not self.needs_mask:
            B, S = self.real.shape
            return torch.arange(S, device=self.real.device).expand(B, S)
        valid = torch.cat([self.past_valid, self.real], dim=1)
        return count_positions(valid)[:, self.past_valid.shape[1] :]

    def num_keys(self, past_key_values: Cache | None, layer: int = 0) -> int:
        """How many keys the attention of a layer will get."""
        length = self.real.shape[1]
        if past_key_values is None:
            return length
        return int(past_key_values.get_mask_sizes(length, layer)[0])

    def cached_light(self, past_full: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Cached newline and text rows, (B, N) padded, and which entries are real; None if none.

        ``past_full`` is what ``remember_full_rows`` gives.
        """
        if past_full is None:
            return None, None
        light = self.past_valid & ~past_full
        most = int(light.sum(dim=1).max()) if light.shape[1] else 0
        if most == 0:
            return None, None
        index = light.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        return index, light.gather(1, index)


def past_length(past_key_values: Cache | None, layer: int = 0) -> int:
    """How many rows a layer of the cache holds."""
    return 0 if past_key_values is None else int(past_key_values.get_seq_length(layer))


def real_rows(attention_mask: Tensor | None, image_mask: Tensor, past: int) -> Tensor:
    """(B, S) False where one of the new rows, those of ``image_mask``, is padding.

    Raises:
        ValueError: a prepared mask, or one that is too short.
    """
    if attention_mask is None:
        return torch.ones_like(image_mask)
    mask = _covered(attention_mask, past, image_mask.shape[1])
    return mask[:, past:].bool().to(image_mask.device)


def _covered(attention_mask: Tensor, past: int, length: int) -> Tensor:
    """The part (B, past + length) of a mask that says something of cached and new rows.

    It may go on behind them: a static cache has more places than rows.
    """
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.dim()} dimensions: with images it must be "
            "(B, tokens)"
        )
    if attention_mask.shape[1] < past + length:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens, but there are {past} "
            f"cached and {length} new ones: it must cover both"
        )
    return attention_mask[:, : past + length]


def plain_rows(
    embeds: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
) -> tuple[Any, Tensor | None]:
    """Mask and positions of rows without images, for the stock model.

    A mask that hides nothing a real row could see is dropped; positions of rows padded on the
    left are counted over real tokens. Prepared masks, which families with several kinds of layers
    get as a dictionary of them, and decoding steps are left as they are.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return attention_mask, position_ids
    past = past_length(past_key_values)
    if past and position_ids is not None:
        return attention_mask, position_ids
    window = Window.build(embeds, attention_mask, past)
    if position_ids is None and window.left_padded:
        position_ids = window.position_ids()
    return (attention_mask if window.needs_mask else None), position_ids


def remember_full_rows(
    past_key_values: Cache | None, layout: SequenceLayout, window: Window
) -> Tensor | None:
    """Note on the cache which of its rows are full tokens; proxies of later turns ask for it.

    Returns:
        (B, past) True where a row cached before is a full token; None without a cache.

    Raises:
        ValueError: the cache was filled with another batch size.
    """
    if past_key_values is None:
        return None
    B, past = window.past_valid.shape
    known = getattr(past_key_values, "proxyv_full_rows", None)
    if known is None:
        known = window.past_valid.new_zeros(B, 0)
    if known.shape[0] != B:
        raise ValueError(
            f"the cache was filled with images in a batch of {known.shape[0]}, now the batch is "
            f"{B}: start a new cache, or repeat the samples of a GrowingCache, which the model "
            "makes and which keeps count of them"
        )
    known = nn.functional.pad(known[:, :past], (0, past - min(past, known.shape[1])))
    new = layout.full_rows
    past_key_values.proxyv_full_rows = torch.cat([known, new], dim=1)  # type: ignore[attr-defined]
    return known
