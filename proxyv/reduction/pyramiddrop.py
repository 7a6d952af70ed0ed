"""PyramidDrop: drop a share of the image tokens again and again, deeper and deeper.

Before a layer runs, its own queries and keys tell how much the rows that judge attend to each
image token; then all rows that are left are numbered anew. Trains with the same code: the rows
right before each answer judge.

Source: PyramidDrop (CVPR 2025), section 3, and its published code. Differs: newlines are no
    candidates, any number of images, either padding side, grouped-query attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from proxyv.reduction.attention import mean_attention
from proxyv.reduction.base import DecoderReduction, Drop, require_int, require_number
from proxyv.reduction.rows import Rows

__all__ = ["PyramidDrop"]


@dataclass(frozen=True)
class PyramidDrop(DecoderReduction):
    """PyramidDrop with its options.

    Args:
        layers: tokens are dropped after so many layers, ascending.
        ratios: share of all image tokens left after each drop, falling.

    Raises:
        ValueError: an option outside its range.
    """

    layers: tuple[int, ...] = (8, 16, 24)
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    name: ClassVar[str] = "pyramiddrop"
    renumber: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in ("layers", "ratios"):  # JSON knows lists only
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for layer in self.layers:
            require_int("each of pyramiddrop.layers", layer, 1)
        for ratio in self.ratios:
            require_number("each of pyramiddrop.ratios", ratio, 0, 1)
        if not self.layers or len(self.layers) != len(self.ratios):
            raise ValueError(
                f"pyramiddrop.layers={list(self.layers)} and pyramiddrop.ratios="
                f"{list(self.ratios)} must be of one length, at least 1"
            )
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"pyramiddrop.layers must ascend, got {list(self.layers)}")
        if list(self.ratios) != sorted(self.ratios, reverse=True):
            raise ValueError(f"pyramiddrop.ratios must not rise, got {list(self.ratios)}")

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        """A drop before each of the layers named."""
        require_int("each of pyramiddrop.layers", self.layers[-1], 1, num_layers - 1)
        return tuple(Drop(layer, layer) for layer in self.layers)

    def keep_counts(self, number: int, rows: Rows) -> Tensor:
        """(B,) the share of the tokens at the start, rounded down."""
        return (rows.num_image.double() * self.ratios[number]).long()

    def scores(self, query: Tensor, key: Tensor, rows: Rows, scaling: float) -> Tensor:
        """Attention of the judging rows, mean over heads and over them."""
        return mean_attention(query, key, rows, scaling)
