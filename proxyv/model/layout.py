"""Where each token sits, and which position it has: integer arithmetic only, no weights.

Letters used in the whole package: B batch, C crops of an image, s crop side in patches, r side
reduction, F = C*s*s full tokens, P = C*(s/r)^2 proxies, E = C newline tokens, T text tokens,
L = E+T light tokens (those that keep their queries beside the proxies), S = F+E+T rows of the
natural sequence, D width.

An image occupies C*(s*s+1) consecutive rows: the full tokens of a crop in raster order, then its
newline, crop after crop (thumbnail first). A row of the batch may hold any number of images. ``s``
belongs to the image: crops of pooled video frames are smaller.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from proxyv.model.crops import ImageGrid

__all__ = ["CropGroup", "ImageSpan", "SequenceLayout", "build_layout", "find_images"]


@dataclass(frozen=True)
class ImageSpan:
    """One image in one row of the batch: its first row of the sequence and what it becomes."""

    start: int
    grid: ImageGrid


class CropGroup(NamedTuple):
    """Crops of one size, which lie together in the full stream and among the proxies.

    Attributes:
        side: crop side s in tokens.
        num_crops: crops of each batch row, padding included.
        num_proxies: proxies of each crop.
    """

    side: int
    num_crops: int
    num_proxies: int


@dataclass(frozen=True)
class SequenceLayout:
    """Index tensors that split the natural sequence into streams and join it again.

    Rows of a batch differ in their number of full and light tokens, so both streams are padded;
    a padded entry repeats the row's first entry (or row 0) and is False in ``*_valid``. Crops of
    another side (video frames beside pictures) come in a group of their own.

    Attributes:
        groups: the crops of each side, in the order in which full tokens and proxies lie.
        full_index: (B, F) natural row of each full token, crops in order, raster order within.
        full_valid: (B, F) False where an entry is padding; whole crops at a time.
        light_index: (B, L) natural row of each newline or text token, in order.
        light_valid: (B, L) False where an entry is padding.
        proxy_anchor: (B, P) natural row of the first full token of the proxy's image.
        proxy_offset: (B, P) rank of the proxy within its image.
        proxy_valid: (B, P) False where an entry is padding.
        slots: (B, S) order used for visibility; a token sees what has a slot not above its own.
        position_shift: (B, S) what the layout adds to each natural position (0 or negative).
        natural_index: (B, S) where each natural row lies in ``[light | full]``; padding points
            at entry 0.
        segments: the same as slices ``(is_full, start, stop)`` where all rows of the batch are
            alike, else None; joining by slices copies once instead of twice.
    """

    groups: tuple[CropGroup, ...]
    full_index: Tensor
    full_valid: Tensor
    light_index: Tensor
    light_valid: Tensor
    proxy_anchor: Tensor
    proxy_offset: Tensor
    proxy_valid: Tensor
    slots: Tensor
    position_shift: Tensor
    natural_index: Tensor
    segments: tuple[tuple[bool, int, int], ...] | None

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
        return _take_rows(rows, self.light_index), _take_rows(rows, self.full_index)

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
        rows = torch.cat([light, full], dim=-2)
        index = self.natural_index
        index = index.view(index.shape[0], *([1] * (rows.dim() - 3)), index.shape[1], 1)
        return rows.gather(-2, index.expand(*rows.shape[:-2], index.shape[-2], rows.shape[-1]))

    def proxy_slots(self) -> Tensor:
        """(B, P) slots of the proxies: consecutive from the slot of their image's first token."""
        return self.slots.gather(1, self.proxy_anchor) + self.proxy_offset

    def proxy_positions(self, position_ids: Tensor) -> Tensor:
        """(B, P) rotary positions of the proxies, from those of the natural rows (B, S)."""
        return position_ids.gather(1, self.proxy_anchor) + self.proxy_offset


def _take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """(B, S, D) and (B, N) -> (B, N, D)."""
    if index.shape[0] == 1:
        return rows.index_select(1, index[0])
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def find_images(image_mask: Tensor, grids: Sequence[ImageGrid]) -> list[list[ImageSpan]]:
    """Assign images to the runs of image tokens, in row order and order of appearance.

    Args:
        image_mask: (B, S) True where the token is an image token.
        grids: the images of the batch.

    Returns:
        For each row of the batch, its images in order.

    Raises:
        ValueError: image tokens and images do not fit together.
    """
    spans: list[list[ImageSpan]] = []
    counts = [grid.num_crops for grid in grids]
    image = 0
    for row, mask in enumerate(image_mask.cpu()):
        where = mask.nonzero().flatten().tolist()
        found: list[ImageSpan] = []
        taken = 0
        while taken < len(where):
            if image >= len(grids):
                raise ValueError(
                    f"row {row} of input_ids has {len(where) - taken} image tokens more than the "
                    f"{len(grids)} images given ({counts} crops) can fill"
                )
            length = grids[image].num_tokens
            last = taken + length - 1
            if last >= len(where) or where[last] - where[taken] != length - 1:
                raise ValueError(
                    f"row {row} of input_ids: image {image} with {counts[image]} crops needs "
                    f"{length} consecutive image tokens from column {where[taken]} on, but the "
                    f"row has {len(where)} image tokens in all; num_crops is {counts}"
                )
            found.append(ImageSpan(where[taken], grids[image]))
            taken += length
            image += 1
        spans.append(found)
    if image < len(grids):
        raise ValueError(
            f"{len(grids)} images were given, but input_ids has image tokens for {image} only"
        )
    return spans


def build_layout(
    spans: Sequence[Sequence[ImageSpan]],
    real: Tensor,
    num_proxies: Callable[[int], int],
    *,
    released: bool = False,
) -> SequenceLayout:
    """Lay out a batch: which rows are full, light or padding, and where proxies belong.

    Args:
        spans: the images of each row, as ``find_images`` gives them.
        real: (B, S) False where the row is padding.
        num_proxies: proxies of a crop of a given side, ``ProxyVConfig.num_proxies``.
        released: use the positions of the released weights: the newline of every crop but an
            image's first sits s*s+1 positions early.

    Returns:
        The layout, on the device of ``real``.

    Source: authors' prepare_image_information (position ids). Differs: "natural" is new; the
        authors know the released positions only.
    """
    sides = sorted({span.grid.side for images in spans for span in images}, reverse=True)
    rows = [_lay_out_row(images, real_row, sides, num_proxies, released)
            for images, real_row in zip(spans, real.cpu(), strict=True)]  # fmt: skip
    full_index, full_valid, full_lengths = _pad_groups([row.full for row in rows])
    anchor, proxy_valid, _ = _pad_groups([row.proxy_anchor for row in rows])
    offset, _, _ = _pad_groups([row.proxy_offset for row in rows])
    light_index, light_valid = _pad([row.light for row in rows])
    shift = torch.stack([row.shift for row in rows])
    length = real.shape[1]

    natural = torch.zeros(len(rows), length, dtype=torch.long)
    numbers = torch.arange(full_index.shape[1]) + light_index.shape[1]
    for index, row in enumerate(rows):
        natural[index, row.light] = torch.arange(len(row.light))
        natural[index, full_index[index, full_valid[index]]] = numbers[full_valid[index]]
    alike = bool(full_valid.all() and light_valid.all() and (natural == natural[:1]).all())
    covered = light_index.shape[1] + full_index.shape[1] == length
    segments = _segments(natural[0], light_index.shape[1]) if alike and covered else None
    return SequenceLayout(
        groups=tuple(
            CropGroup(side, rows_of_side // side**2, num_proxies(side))
            for side, rows_of_side in zip(sides, full_lengths, strict=True)
        ),
        full_index=full_index,
        full_valid=full_valid,
        light_index=light_index,
        light_valid=light_valid,
        proxy_anchor=anchor,
        proxy_offset=offset,
        proxy_valid=proxy_valid,
        slots=torch.arange(length)[None] + shift,
        position_shift=shift,
        natural_index=natural,
        segments=segments,
    ).to(real.device)


@dataclass(frozen=True)
class _Row:
    """Indices of one row of the batch before padding; lists have one entry for each side."""

    full: list[Tensor]
    light: Tensor
    proxy_anchor: list[Tensor]
    proxy_offset: list[Tensor]
    shift: Tensor


def _lay_out_row(
    images: Sequence[ImageSpan],
    real: Tensor,
    sides: Sequence[int],
    num_proxies: Callable[[int], int],
    released: bool,
) -> _Row:
    """Indices of one row; ``real`` is (S,)."""
    is_light = real.bool().clone()
    shift = torch.zeros(real.shape[0], dtype=torch.long)
    none = torch.zeros(0, dtype=torch.long)
    full, anchors, offsets = ({side: [none] for side in sides} for _ in range(3))
    for image in images:
        side, per_crop = image.grid.side, image.grid.side**2 + 1
        crops = image.start + per_crop * torch.arange(image.grid.num_crops)  # (C,)
        rows = (crops[:, None] + torch.arange(per_crop - 1)).flatten()
        is_light[rows] = False
        full[side].append(rows)
        if released:
            shift[crops[1:] + per_crop - 1] = -per_crop
        ranks = torch.arange(image.grid.num_crops * num_proxies(side))
        anchors[side].append(torch.full_like(ranks, image.start))
        offsets[side].append(ranks)
    return _Row(
        full=[torch.cat(full[side]) for side in sides],
        light=is_light.nonzero().flatten(),
        proxy_anchor=[torch.cat(anchors[side]) for side in sides],
        proxy_offset=[torch.cat(offsets[side]) for side in sides],
        shift=shift,
    )


def _pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack index vectors, padding with each one's first entry; also what is no padding."""
    length = max(len(row) for row in rows)
    valid = torch.arange(length)[None] < torch.tensor([len(row) for row in rows])[:, None]
    index = torch.zeros(len(rows), length, dtype=torch.long)
    for target, row in zip(index, rows, strict=True):
        if len(row):
            target[:] = row[0]
            target[: len(row)] = row
    return index, valid


def _pad_groups(rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor, list[int]]:
    """``_pad`` for each group of crops, one group behind the other; also the groups' lengths."""
    none = torch.zeros(len(rows), 0, dtype=torch.long)
    parts = [_pad(group) for group in zip(*rows, strict=True)]
    index = torch.cat([none, *(index for index, _ in parts)], dim=1)
    valid = torch.cat([none.bool(), *(valid for _, valid in parts)], dim=1)
    return index, valid, [index.shape[1] for index, _ in parts]


def _segments(natural: Tensor, num_light: int) -> tuple[tuple[bool, int, int], ...]:
    """The runs of consecutive entries of one row's ``natural_index``."""
    breaks = (natural.diff() != 1).nonzero().flatten() + 1
    is_full = natural >= num_light
    breaks = torch.cat([breaks, (is_full.diff()).nonzero().flatten() + 1]).unique()
    bounds = [0, *breaks.tolist(), natural.shape[0]]
    segments = []
    for start, stop in itertools.pairwise(bounds):
        full = bool(is_full[start])
        first = int(natural[start]) - (num_light if full else 0)
        segments.append((full, first, first + stop - start))
    return tuple(segments)
