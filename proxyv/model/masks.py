"""The visibility rule, and the few small masks that follow from it.

A token sees a key whose slot is not above its own and which is no padding. On top of that, by
stream: text and newline tokens ("light") see full, newline and text tokens and no proxy; a proxy
sees proxies, newline and text tokens and no full token; full tokens are no queries. So a ProxyV
layer needs one mask of L x S and one of P x (P+L), and never one of S x S.

Source: paper section 3.2, authors' attention mask construction. Differs: visibility is never
    written into one (P+S) x (P+S) mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.utils.generic import is_flash_attention_requested

from proxyv.model.layout import SequenceLayout

__all__ = [
    "light_mask",
    "masked_attention",
    "ordinary_mask",
    "proxy_mask",
    "to_backend",
    "visible",
]


def visible(query_slots: Tensor, key_slots: Tensor, key_valid: Tensor) -> Tensor:
    """The rule itself: (B, Q), (B, K), (B, K) -> (B, Q, K), True where the query sees the key.

    A query that would see nothing (only padding is such) is shown the first key, because a
    softmax over nothing is undefined.
    """
    mask = (key_slots[:, None, :] <= query_slots[:, :, None]) & key_valid[:, None, :]
    mask[..., 0] |= ~mask.any(dim=-1)
    return mask


def light_mask(
    layout: SequenceLayout, real: Tensor, past_valid: Tensor, key_length: int, natural_keys: bool
) -> Tensor:
    """What newline and text tokens see.

    Args:
        layout: of the new rows.
        real: (B, S) False where a new row is padding.
        past_valid: (B, past) False where a cached row is padding.
        key_length: number of keys that the cache returns; above past + S for a static cache.
        natural_keys: keys come as ``[past | natural rows]``; else as ``[light | full]``.

    Returns:
        (B, L, key_length) bool.
    """
    queries = layout.slots.gather(1, layout.light_index)
    if not natural_keys:
        keys = torch.cat([queries, layout.slots.gather(1, layout.full_index)], dim=1)
        return visible(queries, keys, torch.cat([layout.light_valid, layout.full_valid], dim=1))
    return _natural_mask(queries, layout.slots, real, past_valid, key_length)


def ordinary_mask(
    layout: SequenceLayout, real: Tensor, past_valid: Tensor, key_length: int
) -> Tensor:
    """The mask of an ordinary layer where slots are not simply consecutive: (B, S, key_length)."""
    return _natural_mask(layout.slots, layout.slots, real, past_valid, key_length)


def proxy_mask(layout: SequenceLayout, past_light_valid: Tensor | None = None) -> Tensor:
    """What proxies see, keys in the order ``[proxy | light]``, or ``[proxy | light | past]``.

    Args:
        layout: of the new rows.
        past_light_valid: (B, N) which of the N cached rows handed on as keys are light tokens.

    Returns:
        (B, P, P+L) bool, or (B, P, P+L+N).
    """
    queries = layout.proxy_slots()
    keys = torch.cat([queries, layout.slots.gather(1, layout.light_index)], dim=1)
    valid = torch.cat([layout.proxy_valid, layout.light_valid], dim=1)
    if past_light_valid is not None:
        keys = torch.cat([keys, torch.full_like(past_light_valid, -1, dtype=keys.dtype)], dim=1)
        valid = torch.cat([valid, past_light_valid], dim=1)
    return visible(queries, keys, valid)


def masked_attention(implementation: str) -> str:
    """The attention function that takes our masks, for the one that a configuration names.

    Flash attention takes none, whether it is installed or a kernel of the hub that transformers
    puts in its place (``kernels-community/flash-attn2``): with it the short attentions of the
    ProxyV layers run through ``sdpa``, while ordinary layers, which need no mask of ours, run
    through flash attention.
    """
    flash = is_flash_attention_requested(requested_attention_implementation=implementation)
    return "sdpa" if flash else implementation


def to_backend(mask: Tensor, implementation: str, dtype: torch.dtype) -> Tensor | BlockMask:
    """Turn (B, Q, K) bool into what an attention function takes: (B, 1, Q, K).

    ``eager`` adds a float mask to the scores, ``flex_attention`` skips blocks that are hidden
    as a whole; every other function takes the booleans. On a CPU torch compiles flex attention
    for every size of mask anew, and forward only.
    """
    if implementation == "flex_attention":
        B, Q, K = mask.shape
        if mask.device.type == "cpu":  # its compiled kernel cannot read a mask of varying size
            torch._dynamo.mark_static(mask)
        return create_block_mask(
            lambda b, h, q, k: mask[b, q, k], B, None, Q, K, device=str(mask.device)
        )
    mask = mask[:, None]
    if implementation != "eager":
        return mask
    hidden = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, hidden)


def _natural_mask(
    queries: Tensor, slots: Tensor, real: Tensor, past_valid: Tensor, key_length: int
) -> Tensor:
    """(B, Q), (B, S), (B, S), (B, past) -> (B, Q, key_length); all of the past comes before."""
    past = past_valid.shape[1]
    unused = key_length - past - slots.shape[1]
    keys = torch.nn.functional.pad(slots, (past, unused), value=-1)
    valid = torch.nn.functional.pad(torch.cat([past_valid, real], dim=1), (0, unused), value=False)
    return visible(queries, keys, valid)
