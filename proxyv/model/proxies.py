"""Making proxies from full tokens, and handing what they know back to the full tokens.

Spatial proxies downsample each s x s crop to (s/r) x (s/r); what a proxy knows goes back to the
r x r block of full tokens that it covers. Learned proxies are what m learned queries gather from a
crop by attention; what they know goes back by the same scores, a softmax the other way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import initialization as init

from proxyv.model.linear import FreshLinear

__all__ = [
    "ProxyInitializer",
    "add_by_splat",
    "add_to_blocks",
    "join_groups",
    "make_spatial_proxies",
    "split_groups",
]


def split_groups(rows: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    """Cut (B, N, D) into the parts of groups of crops; a single group is not cut."""
    return [rows] if len(lengths) == 1 else rows.split(list(lengths), dim=1)


def join_groups(parts: Sequence[Tensor]) -> Tensor:
    """Undo ``split_groups``; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def make_spatial_proxies(full: Tensor, side: int, reduce: int, mode: str) -> Tensor:
    """Downsample each crop's full tokens into its proxies.

    ``bilinear`` samples at the middle of each r x r block without antialiasing: the mean of the
    central 2 x 2 tokens where r is even, the central token where it is odd. ``average`` is the
    mean of the block.

    Args:
        full: (B, C*side*side, D), crops in order, raster order within a crop.
        side: crop side in patches.
        reduce: side reduction r.
        mode: "bilinear" or "average".

    Returns:
        (B, C*(side//reduce)**2, D), same dtype, device and order of crops as ``full``.

    Raises:
        ValueError: ``full`` does not hold whole crops, or ``reduce`` does not divide ``side``.

    Source: paper section 3.2; authors' get_image_proxy. Differs: indexing in place of
        ``interpolate``, same numbers.
    """
    B, N, D = full.shape
    if side % reduce != 0:
        raise ValueError(f"side_reduction={reduce} does not divide the crop side of {side} patches")
    if N % (side * side) != 0:
        raise ValueError(f"{N} full tokens are not a whole number of crops of {side} x {side}")
    blocks = full.view(B, -1, side // reduce, reduce, side // reduce, reduce, D)
    if mode == "bilinear":
        middle = slice((reduce - 1) // 2, reduce // 2 + 1)
        blocks = blocks[:, :, :, middle, :, middle]
    return blocks.mean(dim=(3, 5)).reshape(B, -1, D)


def add_to_blocks(full: Tensor, context: Tensor, side: int, reduce: int) -> Tensor:
    """Add to every full token the row of the proxy that covers it, without repeating rows.

    Args:
        full: (B, C*side*side, h).
        context: (B, C*(side//reduce)**2, h), one row for each proxy.
        side: crop side in patches.
        reduce: side reduction r.

    Returns:
        (B, C*side*side, h).
    """
    B, N, h = full.shape
    blocks = full.view(B, -1, side // reduce, reduce, side // reduce, reduce, h)
    context = context.view(B, -1, side // reduce, 1, side // reduce, 1, h)
    return (blocks + context).view(B, N, h)


def add_by_splat(full: Tensor, context: Tensor, splat: Tensor) -> Tensor:
    """Add to every full token its share of the rows of all learned proxies of its crop.

    Args:
        full: (B, C*n, h).
        context: (B, C*m, h), one row for each proxy.
        splat: (B, C, n, m), as ``ProxyInitializer`` gives it.

    Returns:
        (B, C*n, h).
    """
    B, C, _, m = splat.shape
    rows = context.view(B, C, m, -1)
    return full + (splat.to(rows.dtype) @ rows).flatten(1, 2)


class ProxyInitializer(nn.Module):
    """Learned (non-spatial) proxies: a few queries that attend to the full tokens of a crop.

    Scores ``a = (F W_k) Q^T / sqrt(h)`` of the n full tokens and m queries of a crop are used
    twice: a softmax over the full tokens mixes them (as they are, without a value projection)
    into the proxies, and a softmax over the proxies is the splat matrix by which every later
    guided update hands the proxies' rows back.

    Args:
        hidden_size: model width D.
        width: width h of queries and keys.
        num_proxies: proxies m of each crop.

    Source: paper, the non-spatial ProxyV; authors' ProxyInitializer. Differs: any number
        of tokens and proxies per crop, and tokens may be masked.
    """

    def __init__(self, hidden_size: int, width: int, num_proxies: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_proxies, width) / math.sqrt(4 * width))
        self.key_proj = FreshLinear(hidden_size, width)

    def init_weights(self) -> None:
        """Draw the queries; those that were loaded from a checkpoint are left alone."""
        init.normal_(self.queries, std=1 / math.sqrt(4 * self.queries.shape[1]))

    def forward(
        self, full: Tensor, crop_tokens: int, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Make the proxies of every crop.

        Args:
            full: (B, C*crop_tokens, D), crops one after another.
            crop_tokens: full tokens n of each crop.
            valid: (B, C*crop_tokens) False where a token is padding, which no proxy then holds;
                None if all are real.

        Returns:
            Proxies (B, C*m, D), and the splat matrix (B, C, n, m), its rows zero where a token
            is padding.

        Raises:
            ValueError: ``full`` does not hold whole crops.
        """
        B, N, D = full.shape
        if crop_tokens < 1 or N % crop_tokens != 0:
            raise ValueError(f"{N} full tokens are not a whole number of crops of {crop_tokens}")
        crops = full.view(B, -1, crop_tokens, D)
        keys = self.key_proj(crops)  # (B, C, n, h)
        scores = (keys @ self.queries.to(keys).T).float() / math.sqrt(keys.shape[-1])
        splat = scores.softmax(dim=-1)  # (B, C, n, m)
        if valid is not None:
            hidden = ~valid.view(B, -1, crop_tokens, 1)
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
            splat = splat.masked_fill(hidden, 0)
        gather = scores.softmax(dim=-2).to(full.dtype)
        proxies = gather.transpose(-1, -2) @ crops  # (B, C, m, D)
        return proxies.flatten(1, 2), splat.to(full.dtype)
