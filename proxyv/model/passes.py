"""Work on the full tokens in fewer passes over memory than its plain form, with the same result.

They are by far the most rows, and beside four products with a weight matrix a ProxyV layer only
moves them through memory. Without gradients, what a function was given to own is written over;
with gradients every function is its plain form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["FUSED_NORM_DEVICES", "add_to", "normalise", "rotate"]

FUSED_NORM_DEVICES = ("cuda",)
"""Where torch's ``rms_norm`` is one kernel; on a CPU it takes the steps of the stock module."""


def rotate(heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions to (B, H, N, h); widths beyond the rotary one stay as they are."""
    cos, sin = rope[0][:, None], rope[1][:, None]
    width = cos.shape[-1]
    turned, rest = heads[..., :width], heads[..., width:]
    first, second = turned.chunk(2, dim=-1)
    if torch.is_grad_enabled():
        turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    else:
        turned = turned * cos
        turned[..., : width // 2].addcmul_(second, sin[..., : width // 2], value=-1)
        turned[..., width // 2 :].addcmul_(first, sin[..., width // 2 :])
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def add_to(owned: Tensor, rows: Tensor) -> Tensor:
    """``owned + rows``, of one shape; ``owned`` is written over where nothing else needs it."""
    if torch.is_grad_enabled() or owned.dtype != rows.dtype:
        return owned + rows
    return owned.add_(rows)


def normalise(norm: Any, rows: Tensor) -> Tensor:
    """What a stock RMSNorm makes of (..., D), by one kernel where torch has one.

    That kernel rounds once, the stock module twice, so half precision differs in the last place.
    Weights of another type than the rows, weights elsewhere (offloaded ones come when the module is
    called), and weights that DeepSpeed may have sharded, are left to the module.
    """
    weight, epsilon = norm.weight, getattr(norm, "variance_epsilon", None)
    fused = rows.device.type in FUSED_NORM_DEVICES and weight.dtype == rows.dtype
    if not fused or weight.device != rows.device or epsilon is None or hasattr(weight, "ds_id"):
        return norm(rows)
    return torch.nn.functional.rms_norm(rows, weight.shape, weight, epsilon)
