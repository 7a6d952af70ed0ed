"""Running a language model whose image rows become fewer on the way.

One loop over the layers serves every decoder-side method. A prompt with images is read in stages,
each with its own rows, mask and positions; the cache of a layer holds the rows of its stage, and
what decoding has to know about the stages lies on the cache. Decoding drops nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from proxyv.reduction.attention import decoder_heads
from proxyv.reduction.base import DecoderReduction
from proxyv.reduction.rows import Rows, count_positions, select, take

__all__ = ["StageState", "choose_rows", "layer_stages", "run_reduced", "stages_of"]


@dataclass(frozen=True)
class StageState:
    """What a cache has to know of one stage: layers between two drops.

    Attributes:
        valid: (B, K) which cached rows of these layers are real.
        shift: (B, 1) what to take from a position of the whole sequence.
    """

    valid: Tensor
    shift: Tensor


def stages_of(past_key_values: Cache | None) -> tuple[StageState, ...] | None:
    """The stages of a cache that a reduced prompt was read into; None for any other."""
    return getattr(past_key_values, "proxyv_stages", None)


def layer_stages(method: DecoderReduction, num_layers: int) -> list[int]:
    """The stage of each layer: how many drops come before it."""
    drops = method.drops(num_layers)
    return [sum(drop.before <= layer for drop in drops) for layer in range(num_layers)]


@torch.no_grad()
def choose_rows(
    method: DecoderReduction,
    number: int,
    layer: Any,
    hidden: Tensor,
    rope: tuple[Tensor, Tensor],
    rows: Rows,
) -> Tensor:
    """Which rows drop ``number`` leaves, judged by ``layer`` on what enters it: (B, S) bool."""
    index = None if method.all_queries else rows.queries
    query, key = decoder_heads(layer, hidden, rope, index)
    scores = method.scores(query, key, rows, layer.self_attn.scaling)
    return select(scores, rows, method.keep_counts(number, rows))


def run_reduced(
    model: Any,
    method: DecoderReduction,
    embeds: Tensor,
    *,
    rows: Rows | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Rows | None]:
    """Run all layers and the final norm.

    Args:
        model: language model with ``layers``, ``norm``, ``rotary_emb`` and ``config``.
        method: which rows to drop.
        embeds: (B, S, D) new rows.
        rows: what they are, where they are a prompt; None drops nothing (decoding, text). Where
            weights are sharded over processes, give rows for a batch without images too: every
            process then runs the scoring layers' projections equally often.
        attention_mask: (B, past + S) over the whole sequence, where ``rows`` is None.
        position_ids: (B, S) positions in the whole sequence, where ``rows`` is None; counted over
            ``attention_mask`` if None.
        past_key_values: cache to fill and read, one that holds layers of different lengths.
        **kwargs: passed to the layers.

    Returns:
        (B, S', D) and what these rows are; ``Rows.restore`` puts them back among S.

    Raises:
        ValueError: images in a prompt that continues a cache.
    """
    cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    if rows is None:
        return _continue(
            model, method, embeds, attention_mask, position_ids, past_key_values, kwargs
        ), None
    if cached:
        raise ValueError(
            f"reduction method {method.name!r} reads images in the first prompt only, but "
            f"{cached} rows are cached: give the whole conversation at once, without a cache"
        )
    return _read_prompt(model, method, embeds, rows, past_key_values, kwargs)


def _read_prompt(
    model: Any,
    method: DecoderReduction,
    hidden: Tensor,
    rows: Rows,
    past_key_values: Cache | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Rows]:
    drops = method.drops(len(model.layers))
    length = rows.valid.sum(dim=1, keepdim=True)
    stages = [StageState(rows.valid, length - length)]
    rope = model.rotary_emb(hidden, position_ids=rows.positions)
    mask, kept = None, rows.valid
    for index, layer in enumerate(model.layers):
        for number, drop in enumerate(drops):
            if drop.before != index:
                continue
            if drop.scoring == index:
                kept = choose_rows(method, number, layer, hidden, rope, rows)
            rows, hidden = _drop(rows, kept, hidden, method.renumber)
            rope = model.rotary_emb(hidden, position_ids=rows.positions)
            shift = length - rows.valid.sum(dim=1, keepdim=True)
            stages.append(StageState(rows.valid, shift * method.renumber))
            mask = None
        for number, drop in enumerate(drops):
            if drop.scoring == index and drop.before > index:
                kept = choose_rows(method, number, layer, hidden, rope, rows)
        if mask is None:  # one serves all layers of a stage; none where nothing is hidden
            mask = _mask(model, hidden, rows.valid, past_key_values, index)
        hidden = _run_layer(layer, hidden, mask, rows.positions, rope, past_key_values, kwargs)
    if past_key_values is not None:
        past_key_values.proxyv_stages = tuple(stages)  # type: ignore[attr-defined]
    return model.norm(hidden), rows


def _continue(
    model: Any,
    method: DecoderReduction,
    hidden: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Rows without images, after whatever is cached."""
    B, S, _ = hidden.shape
    cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    if attention_mask is None:
        attention_mask = hidden.new_ones(B, cached + S)
    whole = attention_mask.bool()
    if position_ids is None:
        position_ids = count_positions(whole)[:, -S:]
    position_ids = position_ids.expand(B, -1)
    of_layer = layer_stages(method, len(model.layers))
    stages = stages_of(past_key_values)
    if stages is None:  # the cache holds whole sequences in every layer
        none = position_ids.new_zeros(B, 1)
        stages = (StageState(whole[:, : whole.shape[1] - S], none),) * (max(of_layer) + 1)
    if stages[0].valid.shape[0] != B:
        raise ValueError(
            f"the cache was filled in a batch of {stages[0].valid.shape[0]}, now the batch is {B}: "
            "start a new cache"
        )
    new: list[StageState] = []
    for index, layer in enumerate(model.layers):
        if of_layer[index] == len(new):
            stage = stages[len(new)]
            # A cache that was cut back is shorter than what is noted of it.
            past = 0 if past_key_values is None else int(past_key_values.get_seq_length(index))
            valid = torch.cat([stage.valid[:, :past], whole[:, -S:]], dim=1)
            new.append(StageState(valid, stage.shift))
            positions = position_ids - stage.shift
            rope = model.rotary_emb(hidden, position_ids=positions)
            mask = _mask(model, hidden, valid, past_key_values, index)
        hidden = _run_layer(layer, hidden, mask, positions, rope, past_key_values, kwargs)
    if past_key_values is not None:
        past_key_values.proxyv_stages = tuple(new)  # type: ignore[attr-defined]
    return model.norm(hidden)


def _drop(rows: Rows, kept: Tensor, hidden: Tensor, renumber: bool) -> tuple[Rows, Tensor]:
    rows, index = rows.keep(kept, renumber)
    # Padding is zero, so that no value of a dropped row lives on in it.
    return rows, take(hidden, index).masked_fill(~rows.valid[..., None], 0)


def _mask(
    model: Any, hidden: Tensor, valid: Tensor, past_key_values: Cache | None, index: int
) -> Any:
    """The attention function's own kind of mask; positions with gaps are no packed samples."""
    return create_causal_mask(
        config=model.config,
        inputs_embeds=hidden,
        attention_mask=valid,
        past_key_values=past_key_values,
        position_ids=None,
        layer_idx=index,
    )


def _run_layer(
    layer: Any,
    hidden: Tensor,
    mask: Any,
    positions: Tensor,
    rope: tuple[Tensor, Tensor],
    past_key_values: Cache | None,
    kwargs: dict[str, Any],
) -> Tensor:
    return layer(
        hidden,
        attention_mask=mask,
        position_ids=positions,
        position_embeddings=rope,
        past_key_values=past_key_values,
        use_cache=past_key_values is not None,
        **kwargs,
    )
