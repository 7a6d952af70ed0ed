"""LLaVA-PruMerge and PruMerge+: keep outliers of the class token's attention, merge the rest in.

Per crop, before the projector. How many patches stay follows from the image: those whose
attention lies above the third quartile by more than 1.5 interquartile ranges. PruMerge+ adds
evenly spaced patches. Every kept patch takes in the attention-weighted sum of the patches whose
keys are most like its own, and one more token sums up all that was pruned, where anything was.

Source: LLaVA-PruMerge (ICCV 2025), section 3, and its published code. Differs: any batch, counts
    crop by crop; at least one patch stays where no attention stands out; spatial steps are at
    least 1; patches are never taken twice, so the training variant of "+" with its repeated
    patches is not offered; a crop that keeps every patch has no token that sums up nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from proxyv.model.layout import take_rows
from proxyv.reduction.base import (
    MERGED,
    CropTokens,
    TowerReduction,
    TowerStates,
    require_int,
    require_number,
)

__all__ = ["PruMerge", "class_attention", "count_outliers", "merge_neighbours", "spatial_mask"]

ORDERS = ("score", "raster")


@dataclass(frozen=True)
class PruMerge(TowerReduction):
    """PruMerge with its options.

    Args:
        plus: add evenly spaced patches.
        ratio: share of patches to keep, None for as many as stand out.
        neighbours: patches that a kept one takes in.
        order: "score" (highest attention first, added patches behind them) or "raster".

    Raises:
        ValueError: an option outside its range.
    """

    plus: bool = True
    ratio: float | None = None
    neighbours: int = 32
    order: str = "score"
    name: ClassVar[str] = "prumerge"
    attention_layer: ClassVar[str | None] = "last"

    def __post_init__(self) -> None:
        if not isinstance(self.plus, bool):
            raise ValueError(f"prumerge.plus must be true or false, got {self.plus!r}")
        if self.ratio is not None:
            require_number("prumerge.ratio", self.ratio, 0, 1)
        require_int("prumerge.neighbours", self.neighbours, 1)
        if self.order not in ORDERS:
            raise ValueError(
                f"prumerge.order must be one of {', '.join(ORDERS)}, got {self.order!r}"
            )

    def tokens_per_crop(self, num_patches: int) -> int | None:
        """Kept patches and the extra token, or None where the image decides."""
        if self.ratio is None or self.plus:
            return None
        return min(max(1, int(num_patches * self.ratio)) + 1, num_patches)

    def reduce(self, states: TowerStates) -> CropTokens:
        """Reduce every crop.

        Raises:
            ValueError: a tower without a class token.
        """
        if not states.has_class:
            raise ValueError(
                "reduction method 'prumerge' ranks patches by the class token's attention, but the "
                "vision tower has none: use a CLIP tower or method 'visionzip'"
            )
        assert states.query is not None and states.key is not None, "needs queries and keys"
        query, key = (heads.transpose(1, 2).flatten(2) for heads in (states.query, states.key))
        attention = class_attention(query, key)
        n = attention.shape[1]
        if self.ratio is None:
            counts = count_outliers(attention)
        else:
            counts = torch.full_like(attention[:, 0], int(n * self.ratio), dtype=torch.long)
        counts = counts.clamp(min=1)
        score_rank = attention.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        kept = score_rank < counts[:, None]
        added = spatial_mask(counts, n) & ~kept if self.plus else torch.zeros_like(kept)
        raster = torch.arange(n, device=kept.device).expand_as(score_rank)
        place = raster if self.order == "raster" else torch.where(kept, score_rank, n + raster)
        return merge_neighbours(
            states.patches, key[:, 1:], attention, kept | added, place, self.neighbours
        )


def class_attention(query: Tensor, key: Tensor) -> Tensor:
    """Attention of the class token as one head of the full width.

    Args:
        query: (N, 1, W) of the class token.
        key: (N, 1+n, W), the class token's first.

    Returns:
        (N, n) float32, what is left of the softmax after the class token's own share.
    """
    scores = (query @ key.transpose(1, 2)).float() * key.shape[-1] ** -0.5
    return scores.softmax(dim=-1)[:, 0, 1:]


def count_outliers(attention: Tensor) -> Tensor:
    """(N, n) -> (N,) how many values lie above Q3 + 1.5 (Q3 - Q1), quartiles interpolated."""
    values = attention.double()
    levels = torch.tensor([0.25, 0.75], dtype=values.dtype, device=values.device)
    first, third = values.quantile(levels, dim=1)
    return (values > (third + 1.5 * (third - first))[:, None]).sum(dim=1)


def spatial_mask(counts: Tensor, num_patches: int) -> Tensor:
    """Evenly spaced patches, three times as many as ``counts`` (N,): (N, n) bool.

    The last patch is never one of them, as in the original.
    """
    step = (torch.div(num_patches, counts, rounding_mode="floor") // 3).clamp(min=1)
    numbers = torch.arange(num_patches, device=counts.device)
    return (numbers % step[:, None] == 0) & (numbers < num_patches - 1)


def merge_neighbours(
    patches: Tensor, key: Tensor, attention: Tensor, kept: Tensor, place: Tensor, neighbours: int
) -> CropTokens:
    """Merge what is pruned into what is kept.

    Args:
        patches: (N, n, W).
        key: (N, n, h) compared by cosine.
        attention: (N, n) weights of the patches, used as they are.
        kept: (N, n) True at patches that stay.
        place: (N, n) kept patches come in ascending order of these.
        neighbours: how many other patches, kept or not, a kept one takes in.

    Returns:
        Kept patches and one token for all others, which is last; never more than n tokens, since
        where all are kept there are no others.
    """
    N, n, _ = patches.shape
    counts = kept.sum(dim=1)
    most = int(counts.max())
    index = place.masked_fill(~kept, 2 * n + 1).argsort(dim=1, stable=True)[:, :most]
    valid = kept.gather(1, index)
    unit = torch.nn.functional.normalize(key.float(), dim=-1)
    similarity = take_rows(unit, index) @ unit.transpose(1, 2)  # (N, most, n)
    similarity = similarity.scatter(2, index[..., None], -torch.inf)
    nearest = similarity.topk(min(neighbours, n - 1), dim=-1).indices
    weights = torch.zeros_like(similarity).scatter(
        2, nearest, attention[:, None].expand_as(similarity).gather(2, nearest).to(similarity)
    )
    merged = take_rows(patches, index) + weights.to(patches) @ patches
    rest = (attention.masked_fill(kept, 0).to(patches)[:, None] @ patches)[:, 0]

    tokens = patches.new_zeros(N, most + 1, patches.shape[-1])
    tokens[:, :most] = merged * valid[..., None]
    origin = torch.full((N, most + 1), MERGED, dtype=torch.long, device=patches.device)
    origin[:, :most] = torch.where(valid, index, MERGED)
    tokens = tokens.scatter(
        1, counts[:, None, None].expand(-1, -1, tokens.shape[-1]), rest[:, None]
    )
    tokens, origin = tokens[:, :n], origin[:, :n]
    numbers = torch.arange(tokens.shape[1], device=patches.device)
    return CropTokens(tokens, numbers <= counts[:, None], origin)
