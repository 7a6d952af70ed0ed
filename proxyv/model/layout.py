"""Where each token sits, and which position it has: integer arithmetic only, no weights.

Letters used in the whole package: B batch, C crops of an image, s crop side in patches, r side
reduction, F = C*s*s full tokens, P = C*(s/r)^2 proxies, E = C newline tokens, T text tokens,
L = E+T light tokens (those that keep their queries beside the proxies), S = F+E+T rows of the
natural sequence, D width.

An image occupies C*(s*s+1) consecutive rows: the full tokens of a crop in raster order, then its
newline, crop after crop (thumbnail first). A row of the batch may hold any number of images. ``s``
belongs to the image: crops of pooled video frames are smaller. Token reduction may leave crops that
are no grid, of one length or of several; ``SequenceLayout.keep`` drops rows of a layout.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CropGroup", "SequenceLayout", "natural_index", "take_rows"]


class CropGroup(NamedTuple):
    """Crops of one size, which lie together in the full stream and among the proxies.

    Attributes:
        side: crop side s in tokens; 0 where they are no grid.
        num_crops: crops of each batch row, padding included.
        num_proxies: proxies of each crop.
        longest: full tokens of the longest crop where they are no grid; shorter ones are padded.
    """

    side: int
    num_crops: int
    num_proxies: int
    longest: int = 0

    @property
    def crop_tokens(self) -> int:
        """Entries n of each crop in the full stream."""
        return self.side**2 or self.longest

    @property
    def num_full(self) -> int:
        """Entries of all its crops."""
        return self.num_crops * self.crop_tokens


@dataclass(frozen=True)
class SequenceLayout:
    """Index tensors that split the natural sequence into streams and join it again.

    Rows of a batch differ in their number of full and light tokens, so both streams are padded;
    a padded entry repeats the row's first entry (or row 0) and is False in ``*_valid``. Crops of
    another side (video frames beside pictures) come in a group of their own.

    Attributes:
        groups: the crops of each side, in the order in which full tokens and proxies lie.
        full_index: (B, F) natural row of each full token, crops in order, raster order within.
        full_valid: (B, F) False where an entry is padding; whole crops at a time, but for
            ``ragged``.
        light_index: (B, L) natural row of each newline or text token, in order.
        light_valid: (B, L) False where an entry is padding.
        proxy_anchor: (B, P) natural row of the first row of the proxy's image.
        anchor_slot: (B, P) slot of the first full token of the proxy's image.
        proxy_rank: (B, P) rank of the proxy within its image; its slot counts on by it.
        proxy_offset: (B, P) rotary position of the proxy, from that of its image's first row.
        proxy_valid: (B, P) False where an entry is padding.
        slots: (B, S) order used for visibility; a token sees what has a slot not above its own.
        position_shift: (B, S) what the layout adds to each natural position (0 or negative).
        natural_index: (B, S) where each natural row lies in ``[light | full]``; padding points
            at entry 0.
        segments: the same as slices ``(is_full, start, stop)`` where all rows of the batch are
            alike, else None; joining by slices copies once instead of twice.
        newline: (B, S) True where a natural row is a newline.
        empty: (B, S) True where a row was reserved for a token that does not exist; None if none.
        ragged: some crop has padding among its tokens.
    """

    groups: tuple[CropGroup, ...]
    full_index: Tensor
    full_valid: Tensor
    light_index: Tensor
    light_valid: Tensor
    proxy_anchor: Tensor
    anchor_slot: Tensor
    proxy_rank: Tensor
    proxy_offset: Tensor
    proxy_valid: Tensor
    slots: Tensor
    position_shift: Tensor
    natural_index: Tensor
    segments: tuple[tuple[bool, int, int], ...] | None
    newline: Tensor
    empty: Tensor | None = None
    ragged: bool = False

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> SequenceLayout:
        """The same layout with its tensors on ``device``."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=non_blocking)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Split natural rows (B, S, D) into the light (B, L, D) and the full (B, F, D) stream."""
        return take_rows(rows, self.light_index), take_rows(rows, self.full_index)

    def join(self, light: Tensor, full: Tensor) -> Tensor:
        """Join the streams back into natural order, along the second-to-last dimension.

        Args:
            light: (..., L, X), the batch first.
            full: (..., F, X).

        Returns:
            (..., S, X); padding rows hold a copy of some row.
        """
        if self.segments is not None:
            parts = [
                (full if is_full else light)[..., start:stop, :]
                for is_full, start, stop in self.segments
            ]
            return torch.cat(parts, dim=-2)
        return take_rows(torch.cat([light, full], dim=-2), self.natural_index)

    def proxy_slots(self) -> Tensor:
        """(B, P) slots of the proxies: consecutive from the slot of their image's first token."""
        return self.anchor_slot + self.proxy_rank

    def proxy_positions(self, position_ids: Tensor) -> Tensor:
        """(B, P) rotary positions of the proxies, from those of the natural rows (B, S)."""
        return position_ids.gather(1, self.proxy_anchor) + self.proxy_offset

    @property
    def full_rows(self) -> Tensor:
        """(B, S) True where a natural row is a full token."""
        return self.natural_index >= self.light_index.shape[1]

    def keep(self, kept: Tensor, index: Tensor) -> tuple[SequenceLayout, Tensor]:
        """Drop full tokens, and rows that are neither full nor light.

        Slots stay, so that whatever is left sees what it saw. Proxies stay too.

        Args:
            kept: (B, S) True where a row stays; light rows have to.
            index: (B, S') row before of each row that is left, in order; where False in ``kept``
                it is padding, at one end.

        Returns:
            The layout of the rows left, and the index (B, F') of each full token in the full
            stream before.
        """
        left = kept.gather(1, index)  # (B, S')
        numbers = torch.arange(index.shape[1], device=index.device).expand_as(index)
        place = torch.zeros_like(kept, dtype=torch.long).scatter(1, index, numbers)
        groups, chosen, valid = self._keep_full(kept.gather(1, self.full_index) & self.full_valid)
        full_index = place.gather(1, self.full_index.gather(1, chosen))
        light_index = place.gather(1, self.light_index)
        # How many rows that stay come before a row, behind padding on the left.
        before = kept.long().cumsum(dim=1) - kept.long()
        first = left.int().argmax(dim=1, keepdim=True)
        layout = dataclasses.replace(
            self,
            groups=groups,
            full_index=full_index,
            full_valid=valid,
            light_index=light_index,
            proxy_anchor=first + before.gather(1, self.proxy_anchor),
            slots=self.slots.gather(1, index),
            position_shift=self.position_shift.gather(1, index),
            natural_index=natural_index(
                light_index, self.light_valid, full_index, valid, index.shape[1]
            ),
            segments=None,
            newline=self.newline.gather(1, index) & left,
            empty=None,
            ragged=True,
        )
        return layout, chosen

    def _keep_full(self, kept: Tensor) -> tuple[tuple[CropGroup, ...], Tensor, Tensor]:
        """Pack what stays of each crop, (B, F) bool: groups, index (B, F'), validity (B, F')."""
        groups, chosen, valid, start = [], [], [], 0
        for group in self.groups:
            crops = kept[:, start : start + group.num_full].unflatten(
                1, (group.num_crops, group.crop_tokens)
            )
            longest = max(1, int(crops.sum(dim=2).max())) if crops.numel() else 1
            order = crops.int().argsort(dim=2, descending=True, stable=True)[..., :longest]
            valid.append(crops.gather(2, order).flatten(1))
            firsts = torch.arange(group.num_crops, device=kept.device) * group.crop_tokens
            chosen.append((order + start + firsts[:, None]).flatten(1))
            groups.append(CropGroup(0, group.num_crops, group.num_proxies, longest))
            start += group.num_full
        return tuple(groups), torch.cat(chosen, dim=1), torch.cat(valid, dim=1)

    def without_empty_crops(self) -> SequenceLayout:
        """The same without the proxies of crops of which no token is left."""
        alive, start = [], 0
        for group in self.groups:
            crops = self.full_valid[:, start : start + group.num_full]
            crops = crops.unflatten(1, (group.num_crops, group.crop_tokens)).any(dim=2)
            alive.append(crops.repeat_interleave(group.num_proxies, dim=1))
            start += group.num_full
        valid = self.proxy_valid & torch.cat(alive, dim=1)
        return dataclasses.replace(self, proxy_valid=valid)


def natural_index(
    light_index: Tensor, light_valid: Tensor, full_index: Tensor, full_valid: Tensor, length: int
) -> Tensor:
    """(B, length) where each natural row lies in ``[light | full]``; 0 for any other row."""
    where = torch.cat([light_index, full_index], dim=1)
    where = where.masked_fill(~torch.cat([light_valid, full_valid], dim=1), length)
    numbers = torch.arange(where.shape[1], device=where.device).expand_as(where)
    natural = torch.zeros(where.shape[0], length + 1, dtype=torch.long, device=where.device)
    return natural.scatter(1, where, numbers)[:, :length]


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """(B, ..., S, X) and (B, N) -> (B, ..., N, X): rows by number, for each sample its own."""
    if index.shape[0] == 1:  # one pass over memory, a row at a time
        return rows.index_select(-2, index[0])
    index = index.view(index.shape[0], *([1] * (rows.dim() - 3)), -1, 1)
    return rows.gather(-2, index.expand(*rows.shape[:-2], -1, rows.shape[-1]))
