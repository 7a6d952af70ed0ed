"""What a method at the tower gets to see, from one run of the tower with all hidden states.

Queries and keys of a layer are computed again from the hidden state that enters it, so nothing is
hooked and the tower may use any attention function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from proxyv.reduction.base import TowerReduction, TowerStates

__all__ = ["tower_attention", "tower_states"]


def tower_states(
    tower: Any,
    hidden_states: Sequence[Tensor],
    method: TowerReduction,
    feature_layer: int | Sequence[int],
    has_class: bool,
) -> TowerStates:
    """Collect what ``method`` needs.

    Args:
        tower: vision tower whose encoder has ``layers``.
        hidden_states: as the tower gives them, the embeddings first; each (N, c+n, W).
        method: of stage "tower".
        feature_layer: which of them are the features.
        has_class: their first row is the class token.

    Raises:
        ValueError: features of several layers, or those of no layer, for a method that needs
            the attention of the layer that produced them.
    """
    if not isinstance(feature_layer, int):
        if len(feature_layer) != 1:
            raise ValueError(
                f"vision_feature_layer={list(feature_layer)} names {len(feature_layer)} layers, "
                f"but reduction method {method.name!r} works on those of one layer: name one"
            )
        feature_layer = feature_layer[0]
    features = hidden_states[feature_layer]
    if method.attention_layer is None:
        return TowerStates(features, has_class)
    layers = getattr(tower, "vision_model", tower).encoder.layers
    number = len(layers) - 1
    if method.attention_layer == "producing":
        # Hidden state 0 is the embeddings, so state i comes from layer i - 1.
        number = feature_layer % len(hidden_states) - 1
        if number < 0:
            raise ValueError(
                f"vision_feature_layer={feature_layer} is the tower's embeddings, which no layer "
                f"produced, but reduction method {method.name!r} needs that layer's attention"
            )
    query, key = tower_attention(layers[number], hidden_states[number], has_class)
    return TowerStates(features, has_class, query, key)


def tower_attention(layer: Any, hidden: Tensor, has_class: bool) -> tuple[Tensor, Tensor]:
    """Queries and keys of an encoder layer of the tower, from what enters it.

    Args:
        layer: of CLIP or SigLIP, with ``layer_norm1`` and ``self_attn.{q,k}_proj``.
        hidden: (N, c+n, W) hidden state before the layer.
        has_class: the first row is the class token.

    Returns:
        Query (N, H, R, h), of the class token only where there is one, and key (N, H, c+n, h);
        both unscaled.
    """
    attn, normed = layer.self_attn, layer.layer_norm1(hidden)
    query = attn.q_proj(normed[:, :1] if has_class else normed)
    heads = [
        rows.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        for rows in (query, attn.k_proj(normed))
    ]
    return heads[0], heads[1]
