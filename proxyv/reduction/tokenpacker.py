"""TokenPacker: a projector that packs each block of patches into one token, by attention.

A coarse grid, the patches sampled down, asks; each of its cells attends only to the patches of its
own block, with features of several tower layers. The result is a grid again, so spatial proxies
can be made of it.

Source: TokenPacker (IJCV 2025), section 3, and its published code. Differs: any grid whose side
    the scale divides; widths come from the backbones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from proxyv.model.proxies import make_spatial_proxies
from proxyv.reduction.base import ProjectorReduction, require_int

__all__ = ["TokenPacker", "TokenPackerProjector"]


@dataclass(frozen=True)
class TokenPacker(ProjectorReduction):
    """TokenPacker with its options.

    Args:
        scale: side of a block; a crop of s x s patches becomes (s / scale) ** 2 tokens.
        heads: attention heads.

    Raises:
        ValueError: an option outside its range.
    """

    scale: int = 2
    heads: int = 8
    name: ClassVar[str] = "tokenpacker"
    keeps_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_int("tokenpacker.scale", self.scale, 1)
        require_int("tokenpacker.heads", self.heads, 1)

    def tokens_per_crop(self, num_patches: int) -> int:
        """Blocks of a crop.

        Raises:
            ValueError: the scale does not divide the side.
        """
        side = math.isqrt(num_patches)
        if side % self.scale:
            divisors = [str(d) for d in range(1, side + 1) if side % d == 0]
            raise ValueError(
                f"tokenpacker.scale={self.scale} does not divide the crop side of {side} patches: "
                f"use one of {', '.join(divisors)}"
            )
        return (side // self.scale) ** 2

    def build(self, vision_width: int, hidden_size: int, side: int, levels: int) -> nn.Module:
        """The projector.

        Raises:
            ValueError: a side or a width that the options do not divide.
        """
        self.tokens_per_crop(side**2)
        if vision_width % self.heads:
            raise ValueError(
                f"tokenpacker.heads={self.heads} does not divide the tower's width of "
                f"{vision_width}: choose a divisor"
            )
        return TokenPackerProjector(
            vision_width, hidden_size, side, levels, scale=self.scale, heads=self.heads
        )


class TokenPackerProjector(nn.Module):
    """The projector itself; its parameters do not depend on the scale.

    Args:
        vision_width: width W of one tower layer.
        hidden_size: width D of the language model.
        side: crop side in patches.
        levels: tower layers whose features lie side by side, that of the queries last.
        scale: side of a block.
        heads: attention heads.
    """

    def __init__(
        self,
        vision_width: int,
        hidden_size: int,
        side: int,
        levels: int,
        *,
        scale: int,
        heads: int,
    ) -> None:
        super().__init__()
        W, self.side, self.levels, self.scale = vision_width, side, levels, scale
        self.query_proj = nn.Linear(W, W, bias=False)
        self.query_norm = nn.LayerNorm(W, eps=1e-6)
        self.key_mlp = nn.Sequential(nn.Linear(levels * W, W), nn.GELU(), nn.Linear(W, W))
        self.key_norm = nn.LayerNorm(W, eps=1e-6)
        self.value_mlp = nn.Sequential(nn.Linear(levels * W, W), nn.GELU(), nn.Linear(W, W))
        self.value_norm = nn.LayerNorm(W, eps=1e-6)
        self.attention = nn.MultiheadAttention(W, heads, batch_first=True)
        self.out_mlp = nn.Sequential(
            nn.Linear(W, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights; those that were loaded from a checkpoint are left alone."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                init.ones_(module.weight)
                init.zeros_(module.bias)
        init.xavier_uniform_(self.attention.in_proj_weight)
        init.zeros_(self.attention.in_proj_bias)

    def forward(self, features: Tensor) -> Tensor:
        """Pack crops.

        Args:
            features: (N, side*side, levels*W) in raster order.

        Returns:
            (N, (side/scale)**2, D) in raster order.

        Raises:
            ValueError: another number of patches, or of features.
        """
        _, n, width = features.shape
        W = self.query_proj.in_features
        if n != self.side**2 or width != self.levels * W:
            raise ValueError(
                f"tokenpacker got crops of {n} patches with {width} features, but was built for "
                f"{self.side**2} with {self.levels} x {W}: check vision_feature_layer"
            )
        return self.pack(features[..., -W:], features)

    def pack(self, asking: Tensor, asked: Tensor) -> Tensor:
        """Let the patches ``asking`` (N, n, W), sampled down, attend to ``asked`` (N, n, levels*W).

        Returns:
            (N, (side/scale)**2, D).
        """
        N, _, W = asking.shape
        coarse = make_spatial_proxies(asking, self.side, self.scale, "bilinear")
        query = self.query_norm(self.query_proj(coarse)).view(-1, 1, W)
        key = self._blocks(self.key_norm(self.key_mlp(asked)))
        value = self._blocks(self.value_norm(self.value_mlp(asked)))
        packed, _ = self.attention(query, key, value, need_weights=False)
        return self.out_mlp(packed.view(N, -1, W))

    def _blocks(self, rows: Tensor) -> Tensor:
        """(N, s*s, W) -> (N * (s/scale)**2, scale*scale, W)."""
        N, _, W = rows.shape
        cells = self.side // self.scale
        grid = rows.view(N, cells, self.scale, cells, self.scale, W)
        return grid.transpose(2, 3).reshape(-1, self.scale**2, W)
