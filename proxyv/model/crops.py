"""How many crops the images of a batch have, and which of the crops only pad."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["crop_counts", "real_crops"]


def crop_counts(pixel_values: Tensor, num_crops: Tensor | None) -> list[int]:
    """Crops of each image.

    Raises:
        ValueError: ``pixel_values`` of another shape, or counts outside 1 to C_max.
    """
    images = pixel_values.shape[0]
    if pixel_values.dim() not in (4, 5):
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}: expected (images, crops, 3, "
            "height, width), or (images, 3, height, width) with one crop each"
        )
    most = pixel_values.shape[1] if pixel_values.dim() == 5 else 1
    counts = [most] * images if num_crops is None else num_crops.tolist()
    if len(counts) != images or any(not 1 <= count <= most for count in counts):
        raise ValueError(
            f"num_crops={counts} does not fit pixel_values of {images} images with at most "
            f"{most} crops: give one number from 1 to {most} for each image"
        )
    return counts


def real_crops(pixel_values: Tensor, num_crops: Tensor | None) -> tuple[Tensor, list[int]]:
    """Drop the crops that only pad: (crops, 3, height, width), and the crops of each image."""
    counts = crop_counts(pixel_values, num_crops)
    if pixel_values.dim() == 4:
        return pixel_values, counts
    keep = [crops[:count] for crops, count in zip(pixel_values, counts, strict=True)]
    return torch.cat(keep), counts
