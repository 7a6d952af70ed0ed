"""Laying out a batch: from the images of each row to the index tensors of a ``SequenceLayout``.

Each row of the batch is laid out by itself, then all are padded to one length. Letters as in
``layout.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proxyv.model.crops import ImageGrid
from proxyv.model.image_spans import ImageSpan
from proxyv.model.layout import CropGroup, SequenceLayout, natural_index

__all__ = ["build_layout"]


def build_layout(
    spans: Sequence[Sequence[ImageSpan]],
    real: Tensor,
    num_proxies: Callable[[int | None], int],
    *,
    released: bool = False,
    block: int | None = None,
) -> SequenceLayout:
    """Lay out a batch: which rows are full, light or padding, and where proxies belong.

    Args:
        spans: the images of each row, as ``find_images`` gives them.
        real: (B, S) False where the row is padding.
        num_proxies: proxies of a crop of a given side (None: no grid), see
            ``ProxyVConfig.num_proxies``.
        released: use the positions of the released weights: the newline of every crop but an
            image's first sits s*s+1 positions early.
        block: side of the blocks in whose middles spatial proxies sit; None counts on from the
            image's first token.

    Returns:
        The layout, on the device of ``real``.

    Raises:
        ValueError: a row of an image is padding.

    Source: authors' prepare_image_information (position ids). Differs: "natural" is new; the
        authors know the released positions only.
    """
    sides = sorted({span.grid.side or 0 for images in spans for span in images}, reverse=True)
    rows = [_lay_out_row(images, real_row, sides, num_proxies, released, block)
            for images, real_row in zip(spans, real.cpu(), strict=True)]  # fmt: skip
    longest = max((len(crop) for row in rows for crop in row.full.get(0, [])), default=0)
    padded = [_pad_crops([row.full[side] for row in rows], side**2 or longest) for side in sides]
    full_index, full_valid = _join(padded, torch.zeros(len(rows), 0, dtype=torch.long))
    proxies, proxy_valid = _join(
        [_pad([row.proxies[side] for row in rows]) for side in sides],
        torch.zeros(len(rows), 0, 3, dtype=torch.long),
    )
    anchor, rank, offset = proxies.unbind(dim=2)  # each (B, P)
    light_index, light_valid = _pad([row.light for row in rows])
    shift = torch.stack([row.shift for row in rows])
    length = real.shape[1]
    slots = torch.arange(length)[None] + shift
    empty = torch.stack([row.empty for row in rows])

    natural = natural_index(light_index, light_valid, full_index, full_valid, length)
    alike = bool(full_valid.all() and light_valid.all() and (natural == natural[:1]).all())
    covered = light_index.shape[1] + full_index.shape[1] == length
    segments = _segments(natural[0], light_index.shape[1]) if alike and covered else None
    return SequenceLayout(
        groups=tuple(
            CropGroup(side, index.shape[1] // max(1, side**2 or longest),
                      num_proxies(side or None), 0 if side else longest)
            for side, (index, _) in zip(sides, padded, strict=True)
        ),
        full_index=full_index,
        full_valid=full_valid,
        light_index=light_index,
        light_valid=light_valid,
        proxy_anchor=anchor,
        anchor_slot=slots.gather(1, anchor),
        proxy_rank=rank,
        proxy_offset=offset,
        proxy_valid=proxy_valid,
        slots=slots,
        position_shift=shift,
        natural_index=natural,
        segments=segments,
        newline=torch.stack([row.newline for row in rows]),
        empty=empty if empty.any() else None,
        ragged=any(len(crop) < longest for row in rows for crop in row.full.get(0, [])),
    ).to(real.device)  # fmt: skip


@dataclass(frozen=True)
class _Row:
    """Indices of one row of the batch before padding, by side; 0 for crops that are no grid.

    Attributes:
        full: rows of the full tokens of each crop.
        light: rows of newline and text tokens.
        proxies: (P, 3) of each proxy: its image's first row, its rank within the image, and its
            rotary position from that first row.
        newline: (S,) True at newlines.
        empty: (S,) True at rows of an image that hold nothing.
        shift: (S,) what the layout adds to each position.
    """

    full: dict[int, list[Tensor]]
    light: Tensor
    proxies: dict[int, Tensor]
    newline: Tensor
    empty: Tensor
    shift: Tensor


def _lay_out_row(
    images: Sequence[ImageSpan],
    real: Tensor,
    sides: Sequence[int],
    num_proxies: Callable[[int | None], int],
    released: bool,
    block: int | None,
) -> _Row:
    """Indices of one row; ``real`` is (S,)."""
    is_light = real.bool().clone()
    newline, empty = torch.zeros_like(is_light), torch.zeros_like(is_light)
    shift = torch.zeros(real.shape[0], dtype=torch.long)
    full: dict[int, list[Tensor]] = {side: [] for side in sides}
    proxies = {side: [torch.zeros(0, 3, dtype=torch.long)] for side in sides}
    for image in images:
        grid = image.grid
        side, stride = grid.side or 0, grid.rows_per_crop
        rows = image.start + torch.arange(grid.num_tokens).view(grid.num_crops, stride)
        if not is_light[rows].all():  # streams know padding among light rows only
            raise ValueError(
                f"attention_mask hides {int((~is_light[rows]).sum())} of the {rows.numel()} image "
                f"tokens from column {image.start} on: hide whole images by leaving them out"
            )
        is_light[rows[:, :-1].flatten()] = False
        counts = grid.crop_tokens or (stride - 1,) * grid.num_crops
        full[side] += [crop[:count] for crop, count in zip(rows, counts, strict=True)]
        newline[rows[:, -1]] = True
        for crop, count in zip(rows, counts, strict=True):
            empty[crop[count:-1]] = True
        if released:
            shift[rows[1:, -1]] = -stride
        rank = torch.arange(grid.num_crops * num_proxies(side or None))
        offset = rank if block is None else _block_middles(grid, block)
        anchor = torch.full_like(rank, image.start)
        proxies[side].append(torch.stack([anchor, rank, offset], dim=1))
    return _Row(
        full=full,
        light=is_light.nonzero().flatten(),
        proxies={side: torch.cat(parts) for side, parts in proxies.items()},
        newline=newline,
        empty=empty,
        shift=shift,
    )


def _block_middles(grid: ImageGrid, block: int) -> Tensor:
    """(C*(s/r)**2,) rows, from the image's first, of the middle token of each r x r block."""
    assert grid.side is not None, "crops that are no grid have no blocks"
    middle = torch.arange(grid.side // block) * block + block // 2
    within = (middle[:, None] * grid.side + middle).flatten()
    crops = torch.arange(grid.num_crops) * grid.rows_per_crop
    return (crops[:, None] + within).flatten()


def _pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack indices (N, ...), padding with each one's first entry; also what is no padding."""
    length = max(len(row) for row in rows)
    valid = torch.arange(length)[None] < torch.tensor([len(row) for row in rows])[:, None]
    index = torch.zeros(len(rows), length, *rows[0].shape[1:], dtype=torch.long)
    for target, row in zip(index, rows, strict=True):
        if len(row):
            target[:] = row[0]
            target[: len(row)] = row
    return index, valid


def _pad_crops(rows: Sequence[Sequence[Tensor]], tokens: int) -> tuple[Tensor, Tensor]:
    """Stack the crops of each row, padded to ``tokens`` each and to the most crops."""
    most = max(len(crops) for crops in rows)
    if all(len(crop) == tokens for crops in rows for crop in crops):
        empty = torch.zeros(0, dtype=torch.long)
        return _pad([torch.cat(list(crops)) if crops else empty for crops in rows])
    index = torch.zeros(len(rows), most, tokens, dtype=torch.long)
    valid = torch.zeros_like(index, dtype=torch.bool)
    for row, crops in enumerate(rows):
        for place, crop in enumerate(crops):
            index[row, place, : len(crop)] = crop
            valid[row, place, : len(crop)] = True
    return index.flatten(1), valid.flatten(1)


def _join(padded: Sequence[tuple[Tensor, Tensor]], none: Tensor) -> tuple[Tensor, Tensor]:
    """The sides one behind the other, and what is no padding; ``none`` (B, 0, ...) if no sides."""
    valid = torch.zeros(none.shape[:2], dtype=torch.bool)
    return (
        torch.cat([none, *(index for index, _ in padded)], dim=1),
        torch.cat([valid, *(real for _, real in padded)], dim=1),
    )


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
