"""Which rows of the sequence belong to which image of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from proxyv.model.crops import ImageGrid

__all__ = ["ImageSpan", "find_images"]


@dataclass(frozen=True)
class ImageSpan:
    """One image in one row of the batch: its first row of the sequence and what it becomes."""

    start: int
    grid: ImageGrid


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
