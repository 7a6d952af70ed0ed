"""VisionZip: keep the patches that the class token attends to, merge the others into a few.

Per crop, before the projector. ``dominant`` tokens are the class token and the patches with the
highest attention, in raster order; of the rest, evenly spaced targets take in the mean of the
patches most like them.

Source: VisionZip (CVPR 2025), section 3, and its published code. Differs: the crops stay apart,
    each followed by its newline; no attention class is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from proxyv.model.layout import take_rows
from proxyv.reduction.attention import attention_rows
from proxyv.reduction.base import (
    CLASS_TOKEN,
    CropTokens,
    TowerReduction,
    TowerStates,
    require_int,
)
from proxyv.reduction.rows import mask_of

__all__ = ["VisionZip", "merge_similar", "zip_crops"]


@dataclass(frozen=True)
class VisionZip(TowerReduction):
    """VisionZip with its options, counts per crop.

    Args:
        dominant: tokens kept as they are, the class token among them.
        contextual: merged tokens.
        include_class: whether the class token is one of the dominant ones; without it, or in a
            tower that has none, all of them are patches.

    Raises:
        ValueError: an option outside its range.
    """

    dominant: int = 162
    contextual: int = 30
    include_class: bool = True
    name: ClassVar[str] = "visionzip"
    attention_layer: ClassVar[str | None] = "producing"

    def __post_init__(self) -> None:
        require_int("visionzip.dominant", self.dominant, 1)
        require_int("visionzip.contextual", self.contextual, 0)
        if not isinstance(self.include_class, bool):
            raise ValueError(
                f"visionzip.include_class must be true or false, got {self.include_class!r}"
            )

    def tokens_per_crop(self, num_patches: int) -> int:
        """``dominant + contextual``.

        Raises:
            ValueError: a crop has fewer patches.
        """
        total = self.dominant + self.contextual
        if total > num_patches:
            raise ValueError(
                f"visionzip.dominant={self.dominant} and visionzip.contextual={self.contextual} "
                f"ask for {total} tokens of a crop that has {num_patches} patches: lower one"
            )
        return total

    def reduce(self, states: TowerStates) -> CropTokens:
        """Reduce every crop."""
        assert states.query is not None and states.key is not None, "needs queries and keys"
        self.tokens_per_crop(states.patches.shape[1])
        attention = attention_rows(states.query, states.key, states.key.shape[-1] ** -0.5)
        # With a class token one row judges; without, the mean over all rows.
        attention = attention.mean(dim=2)
        if not states.has_class:
            class_row, patches = None, states.features
        else:
            class_row, patches = states.features[:, :1], states.features[:, 1:]
            attention = attention[..., 1:]
        metric = states.key.mean(dim=1)[:, -patches.shape[1] :]
        if not self.include_class:
            class_row = None
        dominant = self.dominant - (class_row is not None)
        return zip_crops(patches, attention, metric, dominant, self.contextual, class_row)


def zip_crops(
    patches: Tensor,
    attention: Tensor,
    metric: Tensor,
    dominant: int,
    contextual: int,
    class_row: Tensor | None = None,
) -> CropTokens:
    """VisionZip on tensors.

    Args:
        patches: (N, n, W) features.
        attention: (N, H, n) how much each head attends to each patch.
        metric: (N, n, h) by which patches are compared.
        dominant: patches kept as they are.
        contextual: merged tokens.
        class_row: (N, 1, W) goes first, or None.

    Returns:
        ``[class, dominant patches in raster order, merged tokens]``, n' of them in every crop.
    """
    N, n, _ = patches.shape
    score = attention.float().sum(dim=1)
    kept = score.argsort(dim=1, descending=True, stable=True)[:, :dominant].sort(dim=1).values
    rest = (~mask_of(kept, n)).nonzero()[:, 1].view(N, n - dominant)
    merged, targets = merge_similar(take_rows(patches, rest), take_rows(metric, rest), contextual)
    tokens = [take_rows(patches, kept), merged]
    origin = [kept, rest.gather(1, targets)]
    if class_row is not None:
        tokens.insert(0, class_row)
        origin.insert(0, torch.full_like(kept[:, :1] if dominant else rest[:, :1], CLASS_TOKEN))
    joined = torch.cat(origin, dim=1)
    return CropTokens(torch.cat(tokens, dim=1), torch.ones_like(joined, dtype=torch.bool), joined)


def merge_similar(patches: Tensor, metric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merge m patches into ``count`` tokens: each target plus the mean of those most like it.

    Args:
        patches: (N, m, W) in raster order.
        metric: (N, m, h) compared by cosine.
        count: tokens to make; targets are every (m // count)-th patch.

    Returns:
        Tokens (N, count, W), and their targets' indices (N, count).

    Source: VisionZip's merging. Differs: no.
    """
    N, m, _ = patches.shape
    step = max(1, m // count) if count else 1
    numbers = torch.arange(m, device=patches.device)
    is_target = (numbers % step == 0) & (numbers < step * count)
    targets, others = numbers[is_target], numbers[~is_target]
    chosen = patches[:, targets]
    if count and len(others):
        unit = torch.nn.functional.normalize(metric.float(), dim=-1)
        nearest = (unit[:, others] @ unit[:, targets].transpose(1, 2)).argmax(dim=-1)
        share = torch.nn.functional.one_hot(nearest, count).to(patches)  # (N, m-count, count)
        sums = share.transpose(1, 2) @ patches[:, others]
        chosen = chosen + sums / share.sum(dim=1).clamp(min=1)[..., None]
    return chosen, targets.expand(N, -1)
