"""Making proxies from full tokens, and handing what they know back to the full tokens.

Spatial proxies downsample each s x s crop to (s/r) x (s/r); what a proxy knows goes back to the
r x r block of full tokens that it covers.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["add_to_blocks", "make_spatial_proxies"]


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
