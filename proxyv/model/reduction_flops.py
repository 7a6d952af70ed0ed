"""FLOPs of token reduction: what a method itself computes, and what it leaves to the layers.

Counted as in ``flops.py``. Crops are taken to lose tokens alike; inside ProxyV layers crops that do
not are padded to the longest, which costs a little more.
"""

from __future__ import annotations

from typing import Any

import torch

from proxyv.reduction.base import DecoderReduction, ProjectorReduction, Reduction
from proxyv.reduction.prumerge import PruMerge
from proxyv.reduction.rows import Rows
from proxyv.reduction.visionzip import VisionZip

__all__ = ["full_tokens", "packer_flops", "scoring_flops", "tower_method_flops"]


def full_tokens(method: Reduction | None, full: int, num_layers: int) -> list[int]:
    """Full tokens that enter each layer, of ``full`` that enter the first."""
    if not isinstance(method, DecoderReduction) or not full:
        return [full] * num_layers
    rows = Rows.build(torch.ones(1, full, dtype=torch.bool))
    left = [full] * num_layers
    for number, drop in enumerate(method.drops(num_layers)):
        kept = min(left[drop.before - 1], int(method.keep_counts(number, rows)))
        left[drop.before :] = [kept] * (num_layers - drop.before)
    return left


def scoring_flops(
    method: Reduction | None, left: list[int], light: int, widths: tuple[int, int, int], fused: bool
) -> int:
    """What choosing rows costs: queries and keys made again, and their scores.

    Args:
        method: of any stage.
        left: full tokens that enter each layer.
        light: newline and text rows.
        widths: of the model, of all query heads, of all key heads.
        fused: one projection makes query, key and value.
    """
    if not isinstance(method, DecoderReduction) or not left[0]:
        return 0
    width, query, key = widths
    total = 0
    for drop in method.drops(len(left)):
        rows = left[drop.scoring] + light
        if drop.scoring == drop.before:  # what enters the layer is what the layer before had
            rows = left[drop.before - 1] + light
        judges = rows if method.all_queries else 1
        projected = rows * (query + 2 * key) if fused else judges * query + rows * key
        total += 2 * width * projected + 2 * judges * rows * query
        if method.all_queries:
            total += 4 * rows * rows  # sums over text and image rows
    return total


def tower_method_flops(config: Any, method: Reduction | None, kept: int) -> int:
    """What a method at the tower computes for one crop of which ``kept`` tokens are left."""
    width, patches = config.vision_config.hidden_size, config.side**2
    if not isinstance(method, (VisionZip, PruMerge)):
        return 0
    attention = 2 * width**2 * (patches + 2) + 2 * (patches + 1) * width
    if isinstance(method, PruMerge):
        return attention + 4 * (kept - 1) * patches * width + 2 * patches * width
    head = width // config.vision_config.num_attention_heads
    rest = patches - (method.dominant - method.include_class)
    others = rest - method.contextual
    return attention + 2 * others * method.contextual * (head + width)


def packer_flops(config: Any, method: ProjectorReduction) -> int:
    """A TokenPacker projector on one crop."""
    W, D, n = config.vision_config.hidden_size, config.text_config.hidden_size, config.side**2
    layers = config.vision_feature_layer
    levels, cells = 1 if isinstance(layers, int) else len(layers), method.tokens_per_crop(n)
    assert cells is not None, "a projector has a fixed number of tokens"
    asked = 2 * 2 * n * (levels * W * W + W * W) + 2 * 2 * n * W * W
    asking = 3 * 2 * cells * W * W
    return asked + asking + 4 * n * W + 2 * cells * (W * D + D * D)
