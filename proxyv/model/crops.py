"""From images to crops and from crops to tokens: the one place that counts both.

The processor asks from the size of an image, the model from the pixels it is given; both get their
numbers here. Height comes before width everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from proxyv.cli import require_one_of

__all__ = [
    "ASPECT_RATIOS",
    "PINPOINTS_HW",
    "CropLayout",
    "ImageGrid",
    "crop_layout",
    "crop_processor",
    "image_grids",
    "num_image_tokens",
    "num_unpadded_tokens",
    "pooled_side",
    "real_crops",
]

ASPECT_RATIOS = ("pad", "anyres")
PINPOINTS_HW = ((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336))
"""LLaVA-NeXT's canvases for crops of 336 pixels."""


@dataclass(frozen=True)
class CropLayout:
    """How one image is cut.

    Attributes:
        num_crops: crops in all, the thumbnail included.
        grid_hw: tiles down and across, without the thumbnail; (0, 0) where that is all.
    """

    num_crops: int
    grid_hw: tuple[int, int]


@dataclass(frozen=True)
class ImageGrid:
    """What one image of a batch becomes in the sequence.

    Attributes:
        num_crops: crops in all.
        side: side of a crop in tokens, after pooling or reduction; None where they are no grid.
        num_tokens: rows of the sequence, newlines included, the same number for every crop.
        crop_tokens: full tokens of each crop, where they are fewer than its rows hold; the rows
            behind them, up to the newline, stay empty. None fills all rows.
        pool_size: patches a side that are averaged to one token before the projector.
    """

    num_crops: int
    side: int | None
    num_tokens: int
    crop_tokens: tuple[int, ...] | None = None
    pool_size: int = 1

    @property
    def rows_per_crop(self) -> int:
        """Rows of a crop, its newline included."""
        return self.num_tokens // self.num_crops


def crop_layout(
    size_hw: tuple[int, int],
    aspect_ratio: str,
    pinpoints_hw: Sequence[Sequence[int]],
    crop_px: int,
) -> CropLayout:
    """Say how an image of a given size is cut; the same for processor, model and FLOPs counts.

    Args:
        size_hw: height and width of the image in pixels.
        aspect_ratio: "pad" or "anyres".
        pinpoints_hw: resolutions that "anyres" chooses from, (height, width) each; the first
            wins a tie.
        crop_px: side of a crop in pixels.

    Returns:
        The cut. A resolution of a single tile gives the thumbnail alone, since the tile would
        show the same again.

    Raises:
        ValueError: an unknown ``aspect_ratio``, an empty image, no pinpoints, or a pinpoint that
            crops do not tile.

    Source: authors' select_best_resolution and process_anyres_image. Differs: height first; they
    have no resolution of a single tile.
    """
    require_one_of("image_aspect_ratio", aspect_ratio, ASPECT_RATIOS)
    height, width = int(size_hw[0]), int(size_hw[1])
    if height < 1 or width < 1:
        raise ValueError(f"image of height {height} and width {width}: both must be at least 1")
    single = CropLayout(1, (0, 0))
    if aspect_ratio == "pad":
        return single
    if not pinpoints_hw:
        raise ValueError("image_grid_pinpoints is empty: give at least one (height, width)")
    best_h, best_w = select_best_resolution((height, width), [tuple(p) for p in pinpoints_hw])
    if best_h % crop_px or best_w % crop_px:
        raise ValueError(
            f"image_grid_pinpoints holds ({best_h}, {best_w}), which crops of {crop_px} pixels do "
            f"not tile: use multiples of {crop_px}"
        )
    grid = (best_h // crop_px, best_w // crop_px)
    if grid == (1, 1):
        return single
    return CropLayout(grid[0] * grid[1] + 1, grid)


def crop_processor(
    crop_px: int, pinpoints_hw: Sequence[Sequence[int]], **statistics: Any
) -> LlavaNextImageProcessorPil:
    """The image processor of transformers that cuts square crops.

    Args:
        crop_px: side of a crop in pixels.
        pinpoints_hw: (height, width) of the canvases that tiles may cover.
        **statistics: ``image_mean`` and ``image_std`` other than CLIP's.
    """
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": crop_px},
        crop_size={"height": crop_px, "width": crop_px},
        image_grid_pinpoints=[list(pair) for pair in pinpoints_hw],
        **statistics,
    )


def num_image_tokens(num_crops: int, side: int) -> int:
    """Tokens that an image takes in the sequence: s*s full tokens and a newline for each crop."""
    return num_crops * (side * side + 1)


def num_unpadded_tokens(size_hw: tuple[int, int], grid_hw: tuple[int, int], side: int) -> int:
    """Tokens that an image takes with ``packing: llava_next``.

    The thumbnail's s*s tokens, then the tiles as one picture: rows and columns that only pad the
    image are left out, and every row that remains ends in a newline.

    Args:
        size_hw: height and width of the image in pixels.
        grid_hw: tiles down and across; (0, 0) for a single crop, which ends in one newline.
        side: crop side in patches.

    Source: transformers' ``unpad_image``, whose rounding is followed. Differs: no.
    """
    if grid_hw == (0, 0):
        return side * side + 1
    rows, columns = grid_hw[0] * side, grid_hw[1] * side
    height, width = size_hw
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
    return side * side + rows * (columns + 1)


def pooled_side(side: int, pool_size: int) -> int:
    """Side of a crop in tokens after pooling ``pool_size`` x ``pool_size`` patches to one.

    Raises:
        ValueError: a pool size that does not divide the side.
    """
    if pool_size < 1 or side % pool_size:
        raise ValueError(
            f"pool_sizes holds {pool_size}, which does not divide the crop side of {side} "
            f"patches: use one of {[r for r in range(1, side + 1) if side % r == 0]}"
        )
    return side // pool_size


def image_grids(
    config: Any,
    pixel_values: Tensor,
    num_crops: Tensor | None = None,
    image_sizes: Tensor | None = None,
    pool_sizes: Tensor | None = None,
) -> list[ImageGrid]:
    """What each image of a batch becomes in the sequence.

    Args:
        config: a ``ProxyVConfig``.
        pixel_values: as the model takes them.
        num_crops: (images,) crops of each; all of ``pixel_values`` by default, or what
            ``image_sizes`` say where the packing is "llava_next".
        image_sizes: (images, 2) height and width; needed by packing "llava_next" only.
        pool_sizes: (images,) patches a side that one token stands for; 1 by default.

    Raises:
        ValueError: inputs that do not fit together or that the packing cannot do without.
    """
    images, most = _shape(pixel_values)
    if config.packing == "llava_next":
        return _unpadded_grids(config, images, most, num_crops, image_sizes, pool_sizes)
    counts = [most] * images if num_crops is None else num_crops.tolist()
    _check_counts(counts, images, most)
    pools = [1] * images if pool_sizes is None else pool_sizes.tolist()
    if len(pools) != images:
        raise ValueError(f"pool_sizes={pools} does not fit {images} images: give one number each")
    method = config.reduction_method
    if method is not None and method.stage != "decoder":
        return _reduced_grids(config, counts, pools)
    sides = [pooled_side(config.side, pool) for pool in pools]
    for side in sides:
        config.check_crop_side(side)
    return [
        ImageGrid(count, side, num_image_tokens(count, side), pool_size=pool)
        for count, side, pool in zip(counts, sides, pools, strict=True)
    ]


def _reduced_grids(config: Any, counts: list[int], pools: list[int]) -> list[ImageGrid]:
    """As ``image_grids``, where a method reduces crops before the decoder."""
    if any(pool != 1 for pool in pools):
        raise ValueError(
            f"pool_sizes={pools} cannot go with reduction method "
            f"{config.reduction_method.name!r}, which reduces whole crops: use a method inside "
            "the decoder (fastv, pyramiddrop), or no pooling"
        )
    rows = config.rows_per_crop
    return [ImageGrid(count, config.crop_side, count * rows) for count in counts]


def real_crops(pixel_values: Tensor, grids: Sequence[ImageGrid]) -> Tensor:
    """Drop the crops that only pad: (crops, 3, height, width)."""
    if pixel_values.dim() == 4:
        return pixel_values
    keep = [crops[: grid.num_crops] for crops, grid in zip(pixel_values, grids, strict=True)]
    return torch.cat(keep)


def _unpadded_grids(
    config: Any,
    images: int,
    most: int,
    num_crops: Tensor | None,
    image_sizes: Tensor | None,
    pool_sizes: Tensor | None,
) -> list[ImageGrid]:
    """As ``image_grids``, for packing "llava_next"."""
    if pool_sizes is not None and any(pool != 1 for pool in pool_sizes.tolist()):
        raise ValueError("packing='llava_next' pools nothing: leave pool_sizes out, or all 1")
    if image_sizes is None or len(image_sizes) != images:
        found = "none" if image_sizes is None else len(image_sizes)
        raise ValueError(
            f"packing='llava_next' needs image_sizes, one (height, width) for each of {images} "
            f"images, got {found}"
        )
    sizes = [(int(height), int(width)) for height, width in image_sizes.tolist()]
    px, pinpoints = config.vision_config.image_size, config.image_grid_pinpoints
    cuts = [crop_layout(size, "anyres", pinpoints, px) for size in sizes]
    counts = [cut.num_crops for cut in cuts] if num_crops is None else num_crops.tolist()
    _check_counts(counts, images, most)
    grids = []
    for size, cut, count in zip(sizes, cuts, counts, strict=True):
        if count not in (1, cut.num_crops):
            raise ValueError(
                f"num_crops={counts} does not fit an image of {size[0]} x {size[1]} pixels "
                f"(height x width), which is cut into {cut.num_crops} crops"
            )
        grid_hw = (0, 0) if count == 1 else cut.grid_hw
        tokens = num_unpadded_tokens(size, grid_hw, config.side)
        grids.append(ImageGrid(count, config.side, tokens))
    return grids


def _shape(pixel_values: Tensor) -> tuple[int, int]:
    """Number of images, and the most crops that any of them can have."""
    if pixel_values.dim() not in (4, 5):
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}: expected (images, crops, 3, "
            "height, width), or (images, 3, height, width) with one crop each"
        )
    return pixel_values.shape[0], pixel_values.shape[1] if pixel_values.dim() == 5 else 1


def _check_counts(counts: Sequence[int], images: int, most: int) -> None:
    if len(counts) != images or any(not 1 <= count <= most for count in counts):
        raise ValueError(
            f"num_crops={list(counts)} does not fit pixel_values of {images} images with at most "
            f"{most} crops: give one number from 1 to {most} for each image"
        )
