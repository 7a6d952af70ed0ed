"""Running a language model whose image rows become fewer on the way.

One loop over the layers serves every decoder-side method. A prompt with images is read in stages,
see ``prompt.py``; what follows drops nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from proxyv.model.window import past_length
from proxyv.reduction.base import DecoderReduction
from proxyv.reduction.prompt import Prompt, ProxyLayers
from proxyv.reduction.rows import Rows, count_positions
from proxyv.reduction.stages import (
    StageState,
    layer_stages,
    note_stages,
    run_layer,
    stage_mask,
    stages_of,
)

__all__ = ["run_reduced"]


def run_reduced(
    model: Any,
    method: DecoderReduction | None,
    embeds: Tensor,
    *,
    rows: Rows | None = None,
    empty: Tensor | None = None,
    proxies: ProxyLayers | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    hidden_states: list[Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Rows | None]:
    """Run all layers and the final norm.

    Args:
        model: language model with ``layers``, ``norm``, ``rotary_emb`` and ``config``.
        method: which rows to drop; None for those in ``empty`` only.
        embeds: (B, S, D) new rows.
        rows: what they are, where they are a prompt; None drops nothing (decoding, text). Where
            weights are sharded over processes, give rows for a batch without images too: every
            process then runs the scoring layers' projections equally often.
        empty: (B, S) True at rows that hold nothing, though the caller counts them; they leave
            before the first layer. ``rows`` takes them for padding.
        proxies: the ProxyV layers, where there are any.
        attention_mask: (B, past + S) over the whole sequence, where ``rows`` is None.
        position_ids: (B, S) positions in the whole sequence, where ``rows`` is None; counted over
            ``attention_mask`` if None.
        past_key_values: cache to fill and read, one that holds layers of different lengths.
        hidden_states: a list that gets what enters each layer, rows that left being zero, and
            the result, as stock models give them; where ``rows`` are given.
        **kwargs: passed to the layers.

    Returns:
        (B, S', D) and what these rows are; ``Rows.restore`` puts them back among S.

    Raises:
        ValueError: images in a prompt that continues a cache, or a cache of another batch.
    """
    cached = past_length(past_key_values)
    if rows is None:
        return _continue(
            model, method, embeds, attention_mask, position_ids, past_key_values, kwargs
        ), None
    if cached:
        raise ValueError(
            f"{_named(method)} reads images in the first prompt only, but {cached} rows are "
            "cached: give the whole conversation at once, without a cache"
        )
    prompt = Prompt(model, method, embeds, rows, empty, proxies, past_key_values)
    return prompt.read(hidden_states, kwargs)


def _named(method: DecoderReduction | None) -> str:
    return "token reduction" if method is None else f"reduction method {method.name!r}"


def _continue(
    model: Any,
    method: DecoderReduction | None,
    hidden: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Rows without images, after whatever is cached."""
    B, S, _ = hidden.shape
    cached, stages = past_length(past_key_values), stages_of(past_key_values)
    if stages is not None and stages[0].valid.shape[0] != B:
        raise ValueError(
            f"the cache was filled in a batch of {stages[0].valid.shape[0]}, now the batch is {B}: "
            "start a new cache, or repeat the samples of a GrowingCache, which the model makes"
        )
    if attention_mask is None:
        attention_mask = hidden.new_ones(B, cached + S)
        if stages is not None and position_ids is None:  # rows that left are counted all the same
            read = stages[0].valid[:, :cached].sum(dim=1, keepdim=True) + stages[0].shift
            position_ids = read + torch.arange(S, device=hidden.device)
    whole = attention_mask.bool()
    if position_ids is None:
        position_ids = count_positions(whole)[:, -S:]
    position_ids = position_ids.expand(B, -1)
    of_layer = layer_stages(method, len(model.layers))
    if stages is None:  # the cache holds whole sequences in every layer
        none = position_ids.new_zeros(B, 1)
        stages = (StageState(whole[:, : whole.shape[1] - S], none),) * (max(of_layer) + 1)
    new: list[StageState] = []
    for index, layer in enumerate(model.layers):
        if of_layer[index] == len(new):
            stage = stages[len(new)]
            # A cache that was cut back is shorter than what is noted of it.
            past = past_length(past_key_values, index)
            valid = torch.cat([stage.valid[:, :past], whole[:, -S:]], dim=1)
            new.append(StageState(valid, stage.shift))
            positions = position_ids - stage.shift
            rope = model.rotary_emb(hidden, position_ids=positions)
            mask = stage_mask(model, hidden, valid, past_key_values, index)
        hidden = run_layer(layer, hidden, mask, positions, rope, past_key_values, kwargs)
    note_stages(past_key_values, new)
    return model.norm(hidden)
