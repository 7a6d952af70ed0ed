"""A control: keep patches at random.

Which ones depends on the seed alone, so that a crop's result does not depend on its batch; average
over seeds to compare with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from proxyv.model.layout import take_rows
from proxyv.reduction.base import CropTokens, TowerReduction, TowerStates, require_int

__all__ = ["RandomDrop"]


@dataclass(frozen=True)
class RandomDrop(TowerReduction):
    """Random patches, the same places in every crop, in raster order.

    Args:
        tokens: patches kept of each crop.
        seed: of the draw.

    Raises:
        ValueError: an option outside its range.
    """

    tokens: int = 144
    seed: int = 0
    name: ClassVar[str] = "random_drop"

    def __post_init__(self) -> None:
        require_int("random_drop.tokens", self.tokens, 1)
        require_int("random_drop.seed", self.seed, 0)

    def tokens_per_crop(self, num_patches: int) -> int:
        """``tokens``.

        Raises:
            ValueError: a crop has fewer patches.
        """
        require_int("random_drop.tokens", self.tokens, 1, num_patches)
        return self.tokens

    def reduce(self, states: TowerStates) -> CropTokens:
        """Reduce every crop."""
        patches = states.patches
        N, n, _ = patches.shape
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(n, generator=generator)[: self.tokens_per_crop(n)].sort().values
        index = drawn.to(patches.device).expand(N, -1)
        return CropTokens(
            take_rows(patches, index), torch.ones_like(index, dtype=torch.bool), index
        )
