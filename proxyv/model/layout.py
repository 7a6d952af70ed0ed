"""Where each token sits, and which position it has: integer arithmetic only, no weights.

Letters used in the whole package: B batch, C crops of an image, s crop side in patches, r side
reduction, F = C*s*s full tokens, P = C*(s/r)^2 proxies, E = C newline tokens, T text tokens,
L = E+T light tokens (those that keep their queries beside the proxies), S = F+E+T rows of the
natural sequence, D width.

An image occupies C*(s*s+1) consecutive rows: the full tokens of a crop in raster order, then its
newline, crop after crop (thumbnail first). A row of the batch may hold any number of images.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ImageSpan", "SequenceLayout", "build_layout", "find_images"]


@dataclass(frozen=True)
class ImageSpan:
    """One image in one row of the batch: its first row of the sequence and its crops."""

    start: int
    num_crops: int


@dataclass(frozen=True)
class SequenceLayout:
    """Index tensors that split the natural sequence into streams and join it again.

    Rows of a batch differ in their number of full and light tokens, so both streams are padded;
    a padded entry repeats the row's first entry (or row 0) and is False in ``*_valid``.

    Attributes:
        side: crop side s in patches.
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

    side: int
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


def find_images(
    image_mask: Tensor, num_crops: Sequence[int], tokens_per_crop: int
) -> list[list[ImageSpan]]:
    """Assign images to the runs of image tokens, in row order and order of appearance.

    Args:
        image_mask: (B, S) True where the token is an image token.
        num_crops: crops of each image of the batch.
        tokens_per_crop: rows per crop, s*s + 1.

    Returns:
        For each row of the batch, its images in order.

    Raises:
        ValueError: image tokens and images do not fit together.
    """
    spans: list[list[ImageSpan]] = []
    image = 0
    for row, mask in enumerate(image_mask.cpu()):
        where = mask.nonzero().flatten().tolist()
        found: list[ImageSpan] = []
        taken = 0
        while taken < len(where):
            if image >= len(num_crops):
                raise ValueError(
                    f"row {row} of input_ids has {len(where) - taken} image tokens more than the "
                    f"{len(num_crops)} images given ({list(num_crops)} crops) can fill"
                )
            length = num_crops[image] * tokens_per_crop
            last = taken + length - 1
            if last >= len(where) or where[last] - where[taken] != length - 1:
                raise ValueError(
                    f"row {row} of input_ids: image {image} with {num_crops[image]} crops needs "
                    f"{length} consecutive image tokens from column {where[taken]} on, but the "
                    f"row has {len(where)} image tokens in all; num_crops is {list(num_crops)}"
                )
            found.append(ImageSpan(where[taken], num_crops[image]))
            taken += length
            image += 1
        spans.append(found)
    if image < len(num_crops):
        raise ValueError(
            f"{len(num_crops)} images were given, but input_ids has image tokens for {image} only"
        )
    return spans


def build_layout(
    spans: Sequence[Sequence[ImageSpan]],
    real: Tensor,
    side: int,
    proxies_per_crop: int,
    *,
    released: bool = False,
) -> SequenceLayout:
    """Lay out a batch: which rows are full, light or padding, and where proxies belong.

    Args:
        spans: the images of each row, as ``find_images`` gives them.
        real: (B, S) False where the row is padding.
        side: crop side s in patches.
        proxies_per_crop: (s/r)^2 spatial proxies, or any number of learned ones.
        released: use the positions of the released weights: the newline of every crop but an
            image's first sits s*s+1 positions early.

    Returns:
        The layout, on the device of ``real``.

    Source: authors' prepare_image_information (position ids). Differs: "natural" is new; the
        authors know the released positions only.
    """
    rows = [_lay_out_row(images, real_row, side, proxies_per_crop, released)
            for images, real_row in zip(spans, real.cpu(), strict=True)]  # fmt: skip
    full_index, full_valid = _pad([row.full for row in rows])
    light_index, light_valid = _pad([row.light for row in rows])
    anchor, proxy_valid = _pad([row.proxy_anchor for row in rows])
    offset, _ = _pad([row.proxy_offset for row in rows])
    shift = torch.stack([row.shift for row in rows])
    length = real.shape[1]

    natural = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        natural[index, row.light] = torch.arange(len(row.light))
        natural[index, row.full] = torch.arange(len(row.full)) + light_index.shape[1]
    alike = bool(full_valid.all() and light_valid.all() and (natural == natural[:1]).all())
    covered = light_index.shape[1] + full_index.shape[1] == length
    segments = _segments(natural[0], light_index.shape[1]) if alike and covered else None
    return SequenceLayout(
        side=side,
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
    """Indices of one row of the batch before padding."""

    full: Tensor
    light: Tensor
    proxy_anchor: Tensor
    proxy_offset: Tensor
    shift: Tensor


def _lay_out_row(
    images: Sequence[ImageSpan], real: Tensor, side: int, proxies_per_crop: int, released: bool
) -> _Row:
    """Indices of one row; ``real`` is (S,)."""
    per_crop = side * side + 1
    is_full = torch.zeros_like(real, dtype=torch.bool)
    shift = torch.zeros(real.shape[0], dtype=torch.long)
    full, anchors, offsets = [], [], []
    for image in images:
        crops = image.start + per_crop * torch.arange(image.num_crops)  # (C,)
        full.append((crops[:, None] + torch.arange(side * side)).flatten())
        if released:
            shift[crops[1:] + side * side] = -per_crop
        num_proxies = image.num_crops * proxies_per_crop
        anchors.append(torch.full((num_proxies,), image.start, dtype=torch.long))
        offsets.append(torch.arange(num_proxies))
    none = torch.zeros(0, dtype=torch.long)
    full_index = torch.cat([none, *full])
    is_full[full_index] = True
    return _Row(
        full=full_index,
        light=(real.bool() & ~is_full).nonzero().flatten(),
        proxy_anchor=torch.cat([none, *anchors]),
        proxy_offset=torch.cat([none, *offsets]),
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
