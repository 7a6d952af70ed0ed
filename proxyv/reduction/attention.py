"""The few attention rows that a method needs, computed again from queries and keys.

No layer is asked for its attention weights, so every attention function may run; a row costs as
much as one row of the layer's attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from proxyv.model.layout import take_rows
from proxyv.model.passes import rotate
from proxyv.reduction.rows import Rows

__all__ = [
    "attention_rows",
    "causal_rows",
    "decoder_heads",
    "mean_attention",
]


def attention_rows(
    query: Tensor, key: Tensor, scaling: float, visible: Tensor | None = None
) -> Tensor:
    """Softmax attention of some queries.

    Args:
        query: (B, H, R, h).
        key: (B, K, S, h); each of the K heads serves H / K query heads.
        scaling: factor of the scores.
        visible: (B, R, S) False where a query does not see a key; None for all.

    Returns:
        (B, H, R, S) float32.
    """
    B, H, R, _ = query.shape
    K = key.shape[1]
    grouped = query.view(B, K, H // K, R, -1)
    scores = (grouped @ key[:, :, None].transpose(-1, -2)).float() * scaling
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1).flatten(1, 2)


def causal_rows(query: Tensor, key: Tensor, rows: Rows, scaling: float) -> Tensor:
    """Causal attention of the rows that judge.

    Args:
        query: (B, H, R, h) of ``rows.queries``.
        key: (B, K, S, h) of all rows.
        rows: what the rows are; nobody sees padding.
        scaling: factor of the scores.

    Returns:
        (B, H, R, S) float32.
    """
    numbers = torch.arange(rows.valid.shape[1], device=key.device)
    visible = (numbers <= rows.queries[..., None]) & rows.valid[:, None]
    return attention_rows(query, key, scaling, visible)


def mean_attention(query: Tensor, key: Tensor, rows: Rows, scaling: float) -> Tensor:
    """How much the judging rows attend to each row, mean over heads, then over them: (B, S)."""
    attention = causal_rows(query, key, rows, scaling).mean(dim=1)  # (B, R, S)
    weights = rows.queries_valid.float()
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    return (weights[..., None] * attention).sum(dim=1)


def decoder_heads(
    layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor], index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Queries and keys of a decoder layer after rotary positions, from what enters it.

    Args:
        layer: stock layer of a family, or ProxyV layer.
        hidden: (B, S, D).
        rope: cosine and sine, each (B, S, rotary width).
        index: (B, R) rows whose queries are wanted; None for all.

    Returns:
        Query (B, H, R, h) and key (B, K, S, h).

    Raises:
        ValueError: a layer that projects in none of the ways known here, or whose weights FSDP2
            gathers in its forward only.
    """
    if hasattr(getattr(layer.input_layernorm, "weight", None), "full_tensor"):  # a DTensor
        raise ValueError(
            "token reduction inside the decoder asks a layer for scores before it runs, when "
            "FSDP2 (fully_shard) has not gathered its weights: use DeepSpeed ZeRO, or shard the "
            "model as a whole"
        )
    normed = layer.input_layernorm(hidden)
    asking = normed if index is None else take_rows(normed, index)
    attn = layer.self_attn
    width = attn.head_dim

    def heads(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (-1, width)).transpose(1, 2)

    if hasattr(attn, "q_proj"):
        query, key = heads(attn.q_proj(asking)), heads(attn.k_proj(normed))
    elif hasattr(attn, "qkv_proj"):
        fused, kv = heads(attn.qkv_proj(normed)), attn.num_key_value_heads
        query, key, _ = fused.split([fused.shape[1] - 2 * kv, kv, kv], dim=1)
        if index is not None:
            query = take_rows(query, index)
    else:
        raise ValueError(
            f"token reduction cannot read queries and keys of {type(attn).__name__}: it needs "
            "q_proj and k_proj, or qkv_proj"
        )
    if hasattr(attn, "q_norm"):
        query, key = attn.q_norm(query), attn.k_norm(key)
    asked = rope if index is None else (take_rows(rope[0], index), take_rows(rope[1], index))
    return rotate(query, asked), rotate(key, rope)
