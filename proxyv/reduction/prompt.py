"""Reading a prompt whose image rows become fewer on the way.

Each stage has its own rows, mask and positions; ProxyV layers lose full tokens, and the rows of
the splat matrices that belong to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from proxyv.model.layout import CropGroup, SequenceLayout, take_rows
from proxyv.model.streams import SplitRows, Streams
from proxyv.reduction.attention import decoder_heads
from proxyv.reduction.base import DecoderReduction
from proxyv.reduction.rows import Rows, select
from proxyv.reduction.stages import StageState, note_stages, run_layer, stage_mask

__all__ = ["Prompt", "ProxyLayers", "choose_rows"]


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


class Prompt:
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
        self.shift = self.counted - rows.valid.sum(dim=1, keepdim=True)
        if self.layout is not None:
            self.anchors = rows.positions.gather(1, self.layout.proxy_anchor)
        self.streams: Streams | None = None
        self.stages: list[StageState] = []
        if empty is None:
            self._new_stage(renumbered=False)
        else:
            self.drop(rows.valid, renumber=False)  # their positions leave empty rows out already

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
        note_stages(self.cache, self.stages, self.length)
        return hidden, self.rows

    def natural(self) -> Tensor:
        """(B, S', D) the rows in their order, without proxies."""
        if not isinstance(self.hidden, SplitRows):
            return self.hidden
        assert self.layout is not None, "streams without a layout"
        main, num_light = self.hidden.main, self.layout.light_index.shape[1]
        return self.layout.join(main[:, main.shape[1] - num_light :], self.hidden.full)

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
        if isinstance(self.hidden, SplitRows):
            assert self.layout is not None, "streams without a layout"
            _, main, full, splats = self.hidden
            full = take_rows(full, chosen).masked_fill(~self.layout.full_valid[..., None], 0)
            if splats is not None:
                splats = _keep_splats(splats, chosen, groups, self.layout.groups)
            self.hidden = SplitRows(None, main, full, splats)
        else:
            # Padding is zero, so that no value of a dropped row lives on in it.
            padding = ~self.rows.valid[..., None]
            self.hidden = take_rows(self.hidden, index).masked_fill(padding, 0)
        self._new_stage(renumber)

    def _new_stage(self, renumbered: bool) -> None:
        """Note which rows the next layers have, and what to take from a position."""
        if renumbered:
            self.shift = self.counted - self.rows.valid.sum(dim=1, keepdim=True)
        self.stages.append(StageState(self.rows.valid, self.shift))
        some = self.hidden.main if isinstance(self.hidden, SplitRows) else self.hidden
        self.rope = self.model.rotary_emb(some, position_ids=self.rows.positions)
        self.mask, self.streams = None, None

    def run_layer(self, index: int, kwargs: dict[str, Any]) -> None:
        """Run one layer; masks serve all layers of a stage."""
        layer, rows = self.model.layers[index], self.rows
        if self.proxies is not None and index >= self.proxies.start:
            assert self.layout is not None, "ProxyV layers without a layout"
            some = self.hidden.main if isinstance(self.hidden, SplitRows) else self.hidden
            if index == self.proxies.start:
                self.layout = self.layout.without_empty_crops()
            if self.streams is None or index == self.proxies.start:
                self.streams = self.proxies.streams(self.layout, rows, some, self.anchors, index)
            self.hidden = layer(
                self.hidden, streams=self.streams, past_key_values=self.cache, **kwargs
            )
            return
        assert not isinstance(self.hidden, SplitRows), "an ordinary layer behind a ProxyV layer"
        if self.mask is None:  # None too where nothing is hidden
            self.mask = stage_mask(self.model, self.hidden, rows.valid, self.cache, index)
        self.hidden = run_layer(
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
        rows = take_rows(splat.flatten(1, 2), index - start)
        kept.append(rows.unflatten(1, (group.num_crops, -1)))
        start += group.num_full
    return tuple(kept)
