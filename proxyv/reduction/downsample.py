"""A control: shrink the pixels of every crop, so that the tower sees fewer patches.

The tower has to interpolate its position embeddings (``interpolate_pos_encoding=True``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import interpolate

from proxyv.reduction.base import ImageReduction, require_int

__all__ = ["Downsample"]


@dataclass(frozen=True)
class Downsample(ImageReduction):
    """Smaller crops, bilinear with antialiasing.

    Args:
        side: side of a shrunken crop in patches.

    Raises:
        ValueError: an option outside its range.
    """

    side: int = 12
    name: ClassVar[str] = "downsample"
    keeps_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_int("downsample.side", self.side, 1)

    def tokens_per_crop(self, num_patches: int) -> int:
        """``side ** 2``.

        Raises:
            ValueError: larger than the crop.
        """
        require_int("downsample.side", self.side, 1, math.isqrt(num_patches))
        return self.side**2

    def shrink(self, pixels: Tensor, patch_px: int) -> Tensor:
        """(N, 3, height, width) -> (N, 3, side*patch_px, side*patch_px)."""
        self.tokens_per_crop((min(pixels.shape[-2:]) // patch_px) ** 2)
        size_px = self.side * patch_px
        # In float32: antialiasing does not exist in every half precision.
        small = interpolate(
            pixels.float(), size=(size_px, size_px), mode="bilinear", antialias=True
        )
        return small.to(pixels.dtype)
