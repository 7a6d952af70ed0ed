"""A control: each token is the mean of a block of patches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from proxyv.model.proxies import make_spatial_proxies
from proxyv.reduction.base import MERGED, CropTokens, TowerReduction, TowerStates, require_int

__all__ = ["AveragePool"]


@dataclass(frozen=True)
class AveragePool(TowerReduction):
    """Average pooling before the projector; the result is a grid again.

    Args:
        block: side of a block.

    Raises:
        ValueError: an option outside its range.
    """

    block: int = 2
    name: ClassVar[str] = "average_pool"
    keeps_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_int("average_pool.block", self.block, 1)

    def tokens_per_crop(self, num_patches: int) -> int:
        """Blocks of a crop.

        Raises:
            ValueError: no square of patches, or one that blocks do not fill.
        """
        side = math.isqrt(num_patches)
        if side * side != num_patches or side % self.block:
            raise ValueError(
                f"average_pool.block={self.block} does not divide a crop of {num_patches} patches: "
                "it must divide the side of a square"
            )
        return (side // self.block) ** 2

    def reduce(self, states: TowerStates) -> CropTokens:
        """Reduce every crop."""
        N, n, _ = states.patches.shape
        count = self.tokens_per_crop(n)
        tokens = make_spatial_proxies(states.patches, math.isqrt(n), self.block, "average")
        origin = torch.full((N, count), MERGED, dtype=torch.long, device=tokens.device)
        return CropTokens(tokens, torch.ones_like(origin, dtype=torch.bool), origin)
