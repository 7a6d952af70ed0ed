"""Running a language model whose image rows become fewer on the way.

One loop over the layers serves every decoder-side method. A prompt with images is read in stages,
each with its own rows, mask and positions; the cache of a layer holds the rows of its stage, and
what decoding has to know about the stages lies on the cache. Decoding drops nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from proxyv.model.decoder import Streams
from proxyv.model.layout import CropGroup, SequenceLayout
from proxyv.reduction.attention import decoder_heads
from proxyv.reduction.base import DecoderReduction
from proxyv.reduction.rows import Rows, count_positions, select, take

__all__ = [
    "ProxyLayers",
    "StageState",
    "choose_rows",
    "layer_stages",
    "rows_read",
    "run_reduced",
    "stages_of",
]


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


def rows_read(past_key_values: Cache | None) -> int | None:
    """Rows of the whole sequence that such a cache stands for, padding included; else None."""
    return getattr(past_key_values, "proxyv_rows", None)


def layer_stages(method: DecoderReduction | None, num_layers: int) -> list[int]:
    """The stage of each layer: how many drops come before it."""
    drops = () if method is None else method.drops(num_layers)
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


@dataclass(frozen=True)
class ProxyLayers:
    """What reading a prompt has to know of ProxyV layers.

    Attributes:
        start: the first of them.
        layout: of the prompt's rows.
        streams: what these layers share, from a layout, the rows that it is of, the hidden state
            of any of them, the position of the first row of each proxy's image (B, P), and the
            layer that comes next.
    """

    start: int
    layout: SequenceLayout
    streams: Callable[[SequenceLayout, Rows, Tensor, Tensor, int], Streams]


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
        ValueError: images in a prompt that continues a cache.
    """
    cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    if rows is None:
        return _continue(
            model, method, embeds, attention_mask, position_ids, past_key_values, kwargs
        ), None
    if cached:
        raise ValueError(
            f"{_named(method)} reads images in the first prompt only, but {cached} rows are "
            "cached: give the whole conversation at once, without a cache"
        )
    prompt = _Prompt(model, method, embeds, rows, empty, proxies, past_key_values)
    return prompt.read(hidden_states, kwargs)


def _named(method: DecoderReduction | None) -> str:
    return "token reduction" if method is None else f"reduction method {method.name!r}"


class _Prompt:
    """A prompt on its way through the layers.

    ``hidden`` holds natural rows (B, S', D), or what one ProxyV layer hands to the next.
    """

    def __init__(
        self,
        model: Any,
        method: DecoderReduction | None,
        embeds: Tensor,
        rows: Rows,
        empty: Tensor | None,
        proxies: ProxyLayers | None,
        past_key_values: Cache | None,
    ) -> None:
        self.model, self.method, self.proxies = model, method, proxies
        self.cache, self.hidden, self.rows = past_key_values, embeds, rows
        self.length = embeds.shape[1]
        self.layout = None if proxies is None else proxies.layout
        counted = rows.valid if empty is None else rows.valid | empty
        self.counted = counted.sum(dim=1, keepdim=True)  # (B, 1) rows as the caller counts them
        if self.layout is not None:
            self.anchors = rows.positions.gather(1, self.layout.proxy_anchor)
        self.streams: Streams | None = None
        self.stages: list[StageState] = []
        if empty is None:
            self._new_stage(renumbered=False)
        else:
            self.drop(rows.valid, renumber=True)

    def read(
        self, hidden_states: list[Tensor] | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Rows]:
        """Run all layers and the norm."""
        drops = () if self.method is None else self.method.drops(len(self.model.layers))
        kept = self.rows.valid
        for index in range(len(self.model.layers)):
            for number, drop in enumerate(drops):
                if drop.before != index:
                    continue
                assert self.method is not None, "a drop without a method"
                if drop.scoring == index:
                    kept = self.choose(number, index)
                self.drop(kept, self.method.renumber)
            for number, drop in enumerate(drops):
                if drop.scoring == index and drop.before > index:
                    kept = self.choose(number, index)
            if hidden_states is not None:
                hidden_states.append(self.rows.restore(self.natural(), self.length))
            self.run_layer(index, kwargs)
        hidden = self.model.norm(self.natural())
        if hidden_states is not None:
            hidden_states.append(self.rows.restore(hidden, self.length))
        if self.cache is not None:
            self.cache.proxyv_stages = tuple(self.stages)  # type: ignore[attr-defined]
            self.cache.proxyv_rows = self.length  # type: ignore[attr-defined]
        return hidden, self.rows

    def natural(self) -> Tensor:
        """(B, S', D) the rows in their order, without proxies."""
        if not isinstance(self.hidden, tuple):
            return self.hidden
        _, main, full, _ = self.hidden
        assert self.layout is not None, "streams without a layout"
        return self.layout.join(main[:, main.shape[1] - self.layout.light_index.shape[1] :], full)

    def choose(self, number: int, index: int) -> Tensor:
        """What drop ``number`` leaves, judged by layer ``index``: (B, S') bool."""
        assert self.method is not None, "a drop without a method"
        layer = self.model.layers[index]
        return choose_rows(self.method, number, layer, self.natural(), self.rope, self.rows)

    def drop(self, kept: Tensor, renumber: bool) -> None:
        """Drop rows: natural ones, or full tokens and their rows of the splat matrices."""
        before, groups = self.rows, () if self.layout is None else self.layout.groups
        self.rows, index = before.keep(kept, renumber)
        if self.layout is not None:
            self.layout, chosen = self.layout.keep(kept & before.valid, index)
            if renumber:
                self.anchors = self.rows.positions.gather(1, self.layout.proxy_anchor)
        if isinstance(self.hidden, tuple):
            assert self.layout is not None, "streams without a layout"
            _, main, full, splats = self.hidden
            full = take(full, chosen).masked_fill(~self.layout.full_valid[..., None], 0)
            if splats is not None:
                splats = _keep_splats(splats, chosen, groups, self.layout.groups)
            self.hidden = (None, main, full, splats)
        else:
            # Padding is zero, so that no value of a dropped row lives on in it.
            padding = ~self.rows.valid[..., None]
            self.hidden = take(self.hidden, index).masked_fill(padding, 0)
        self._new_stage(renumber)

    def _new_stage(self, renumbered: bool) -> None:
        """Note which rows the next layers have, and what to take from a position."""
        shift = self.counted - self.rows.valid.sum(dim=1, keepdim=True)
        if not renumbered:
            shift = self.stages[-1].shift if self.stages else shift * 0
        self.stages.append(StageState(self.rows.valid, shift))
        some = self.hidden[1] if isinstance(self.hidden, tuple) else self.hidden
        self.rope = self.model.rotary_emb(some, position_ids=self.rows.positions)
        self.mask, self.streams = None, None

    def run_layer(self, index: int, kwargs: dict[str, Any]) -> None:
        """Run one layer; masks serve all layers of a stage."""
        layer, rows = self.model.layers[index], self.rows
        if self.proxies is not None and index >= self.proxies.start:
            assert self.layout is not None, "ProxyV layers without a layout"
            some = self.hidden[1] if isinstance(self.hidden, tuple) else self.hidden
            if index == self.proxies.start:
                self.layout = self.layout.without_empty_crops()
            if self.streams is None or index == self.proxies.start:
                self.streams = self.proxies.streams(self.layout, rows, some, self.anchors, index)
            self.hidden = layer(
                self.hidden, streams=self.streams, past_key_values=self.cache, **kwargs
            )
            return
        assert not isinstance(self.hidden, tuple), "an ordinary layer behind a ProxyV layer"
        if self.mask is None:  # None too where nothing is hidden
            self.mask = _mask(self.model, self.hidden, rows.valid, self.cache, index)
        self.hidden = _run_layer(
            layer, self.hidden, self.mask, rows.positions, self.rope, self.cache, kwargs
        )


def _keep_splats(
    splats: Sequence[Tensor],
    chosen: Tensor,
    before: Sequence[CropGroup],
    after: Sequence[CropGroup],
) -> tuple[Tensor, ...]:
    """Rows of the splat matrices (B, C, n, m) of the full tokens that stay: (B, C, n', m)."""
    kept, start = [], 0
    parts = chosen.split([group.num_full for group in after], dim=1)
    for splat, index, group in zip(splats, parts, before, strict=True):
        rows = take(splat.flatten(1, 2), index - start)
        kept.append(rows.unflatten(1, (group.num_crops, -1)))
        start += group.num_full
    return tuple(kept)


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
        past_key_values.proxyv_rows = (rows_read(past_key_values) or cached) + S  # type: ignore[attr-defined]
    return model.norm(hidden)


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
