"""FastV: after a few layers, drop the image tokens to which the prompt's last row attends least.

Scores are the attention of layer K-1, rows leave before layer K, once; positions stay.

Source: FastV (ECCV 2024), section 4, and its published code. Differs: newlines are no candidates,
    all images of a sample compete with one another, and one attention row is computed again
    instead of asking the layer for its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from proxyv.reduction.attention import mean_attention
from proxyv.reduction.base import DecoderReduction, Drop, require_int, require_number
from proxyv.reduction.rows import Rows

__all__ = ["FastV"]


@dataclass(frozen=True)
class FastV(DecoderReduction):
    """FastV with its options.

    Args:
        layer: K, layers that run on all rows, at least 1.
        ratio: share of the image tokens that is dropped.

    Raises:
        ValueError: an option outside its range.
    """

    layer: int = 2
    ratio: float = 0.5
    name: ClassVar[str] = "fastv"

    def __post_init__(self) -> None:
        require_int("fastv.layer", self.layer, 1)
        require_number("fastv.ratio", self.ratio, 0, 1)

    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        """One drop, before layer K."""
        require_int("fastv.layer", self.layer, 1, num_layers - 1)
        return (Drop(self.layer - 1, self.layer),)

    def keep_counts(self, number: int, rows: Rows) -> Tensor:
        """(B,) the share that stays, rounded to the nearest number of tokens."""
        return (rows.num_image.double() * (1 - self.ratio)).round().long()

    def scores(self, query: Tensor, key: Tensor, rows: Rows, scaling: float) -> Tensor:
        """Attention of the judging rows, mean over heads."""
        return mean_attention(query, key, rows, scaling)
