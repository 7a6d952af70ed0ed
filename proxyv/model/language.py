"""A language model whose layers from ``start_layer`` on are ProxyV layers, of any family.

The mixin adds what the ProxyV layers share in one forward pass: the masks, the rotary tables and
the index tensors. The families themselves are in ``families.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from proxyv.model.cache import GrowingCache
from proxyv.model.layout import SequenceLayout
from proxyv.model.linear import FreshLinear
from proxyv.model.masks import (
    light_mask,
    masked_attention,
    ordinary_mask,
    proxy_mask,
    to_backend,
)
from proxyv.model.proxies import ProxyInitializer
from proxyv.model.reduced import prompt_rows, refuse_unsuited
from proxyv.model.skipping import layer_that_skips
from proxyv.model.streams import DecoderOptions, Streams
from proxyv.model.window import Window, past_length, plain_rows, remember_full_rows
from proxyv.reduction.decoding import run_reduced
from proxyv.reduction.prompt import ProxyLayers
from proxyv.reduction.rows import Rows
from proxyv.reduction.stages import stages_of

__all__ = ["ProxyVTextMixin"]


class ProxyVTextMixin:
    """Turns a stock language model into one with ProxyV layers; put it before the stock class.

    Subclasses name their ProxyV layer in ``proxyv_layer``; layers that skip are made from
    it.
    """

    proxyv_layer: Any
    config: Any
    layers: nn.ModuleList
    rotary_emb: Any
    embed_tokens: Any
    gradient_checkpointing: bool
    training: bool
    _no_split_modules: Any
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: PreTrainedConfig, options: DecoderOptions) -> None:
        depth = config.num_hidden_layers
        start = depth if options.start_layer is None else options.start_layer
        # The stock model builds the ordinary layers only; nothing is built twice or swapped.
        config.num_hidden_layers = start
        try:
            super().__init__(config)  # type: ignore[call-arg]
        finally:
            config.num_hidden_layers = depth
        self.options = options
        layer = layer_that_skips(self.proxyv_layer, options.skip)
        for index in range(start, depth):
            self.layers.append(layer(config, index, options))
        self._no_split_modules = {*self._no_split_modules, layer.__name__}
        self.post_init()  # type: ignore[attr-defined]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (FreshLinear, ProxyInitializer)):
            module.init_weights()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        layout: SequenceLayout | None = None,
        judges: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the language model, as the stock one, plus ``layout`` where rows hold images.

        ``judges`` (B, S) names the rows that judge image rows where a method drops some.

        A mask that only hides padding on the right is dropped while nothing is cached: no real
        row can see that padding, and attention without a mask is faster.

        Returns:
            The stock output. With ``layout``, full rows of ``last_hidden_state`` hold the final
            norm of what entered the last layer; rows of padding hold finite values without
            meaning.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            if past_key_values is not None:
                raise ValueError("gradient checkpointing cannot train on past_key_values")
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = GrowingCache(config=self.config)
        if self._drops_rows(layout, past_key_values):
            return self._forward_reduced(
                inputs_embeds, layout, judges, attention_mask, position_ids, past_key_values, kwargs
            )
        if layout is None:
            attention_mask, position_ids = plain_rows(
                inputs_embeds, attention_mask, position_ids, past_key_values
            )
        else:
            past = past_length(past_key_values)
            window = Window.build(inputs_embeds, attention_mask, past)
            if position_ids is None:
                position_ids = window.position_ids()
            position_ids = position_ids + layout.position_shift
            position_ids = position_ids.expand(inputs_embeds.shape[0], -1)
            proxy_positions = layout.proxy_positions(position_ids)
            kwargs["streams"] = self._streams(
                layout, window, inputs_embeds, position_ids, proxy_positions, past_key_values,
                kwargs,
            )  # fmt: skip
            attention_mask = self._ordinary_mask(
                layout, window, inputs_embeds, attention_mask, past_key_values
            )
        return super().forward(  # type: ignore[misc]
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def fuse(self) -> None:
        """Fold the guided updates, see ``ProxyVForConditionalGeneration.fuse``."""
        for layer in self.layers:
            update = getattr(layer, "guided_update", None)
            if update is not None and not layer.is_last:
                update.fuse()

    def _drops_rows(self, layout: SequenceLayout | None, past_key_values: Cache | None) -> bool:
        """Whether layers see fewer rows than come in, now or where the prompt was read.

        In training a batch without images takes the same way, so that processes among which the
        weights are sharded call the same modules.
        """
        if stages_of(past_key_values) is not None:
            return True
        if layout is not None and layout.empty is not None:
            return True
        reads = layout is not None or (self.training and past_key_values is None)
        return self.options.reduction is not None and reads

    def _forward_reduced(
        self,
        embeds: Tensor,
        layout: SequenceLayout | None,
        judges: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        kwargs: dict[str, Any],
    ) -> BaseModelOutputWithPast:
        """As ``forward``, where rows leave on the way; rows that left come out as zeros."""
        refuse_unsuited(self.config, past_key_values, kwargs)
        method = self.options.reduction
        states: list[Tensor] | None = None
        if _flag(self.config, kwargs, "output_hidden_states"):
            states = []
        passed = {k: v for k, v in kwargs.items() if not k.startswith("output_")}
        if stages_of(past_key_values) is not None and layout is None:
            hidden, _ = run_reduced(
                self, method, embeds, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, **passed,
            )  # fmt: skip
            return BaseModelOutputWithPast(hidden, past_key_values)
        window = Window.build(embeds, attention_mask, past_length(past_key_values))
        hidden, left = run_reduced(
            self,
            method,
            embeds,
            rows=prompt_rows(layout, window.real, position_ids, judges),
            empty=None if layout is None else layout.empty,
            proxies=self._proxy_layers(layout, past_key_values),
            past_key_values=past_key_values,
            hidden_states=states,
            **passed,
        )
        assert left is not None, "a prompt was read without rows"
        return BaseModelOutputWithPast(
            last_hidden_state=left.restore(hidden, embeds.shape[1]),
            past_key_values=past_key_values,
            hidden_states=None if states is None else tuple(states),  # type: ignore[arg-type]
        )

    def _proxy_layers(
        self, layout: SequenceLayout | None, past_key_values: Cache | None
    ) -> ProxyLayers | None:
        """The ProxyV layers, for a prompt whose rows become fewer; None where there are none."""
        start = self.options.start_layer
        if start is None or layout is None:
            return None

        def streams(
            layout: SequenceLayout, rows: Rows, some: Tensor, anchors: Tensor, layer: int
        ) -> Streams:
            window = Window(rows.valid, rows.valid[:, :0], False)
            made = self._streams(
                layout, window, some, rows.positions, anchors + layout.proxy_offset,
                past_key_values, {}, layer,
            )  # fmt: skip
            assert made is not None, "a language model with a start layer has streams"
            return made

        return ProxyLayers(start, layout, streams)

    def _ordinary_mask(
        self,
        layout: SequenceLayout,
        window: Window,
        embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
    ) -> Any:
        """What the ordinary layers get: nothing if they can go without, else 2-D or our own."""
        if self.options.released:
            name = self.config._attn_implementation
            if masked_attention(name) != name:
                raise ValueError(
                    f"attn_implementation={name!r} takes no masks, which layout 'released' needs "
                    "in every layer: use 'sdpa', 'flex_attention' or 'eager'"
                )
            num_keys = window.num_keys(past_key_values)
            mask = ordinary_mask(layout, window.real, window.past_valid, num_keys)
            return to_backend(mask, self.config._attn_implementation, embeds.dtype)
        if attention_mask is None or not window.needs_mask:
            return None
        return attention_mask[:, : window.past_valid.shape[1] + window.real.shape[1]]

    def _streams(
        self,
        layout: SequenceLayout,
        window: Window,
        embeds: Tensor,
        position_ids: Tensor,
        proxy_positions: Tensor,
        past_key_values: Cache | None,
        kwargs: dict[str, Any],
        layer: int = 0,
    ) -> Streams | None:
        """Masks and rotary tables of the ProxyV layers from ``layer`` on; None for a baseline."""
        start = self.options.start_layer
        if start is None:
            return None
        keep_hidden, keep_attention = (
            _flag(self.config, kwargs, name)
            for name in ("output_hidden_states", "output_attentions")
        )
        natural_keys = past_key_values is not None or keep_attention
        num_keys = window.num_keys(past_key_values, layer)
        light = light_mask(layout, window.real, window.past_valid, num_keys, natural_keys)
        positions = torch.cat(
            [proxy_positions]
            + [position_ids.gather(1, index) for index in (layout.light_index, layout.full_index)],
            dim=1,
        )
        num_full = layout.full_index.shape[1]
        rope = self.rotary_emb(embeds, position_ids=positions)
        name = self.config._attn_implementation
        past_full = remember_full_rows(past_key_values, layout, window)
        past_light, past_light_valid = window.cached_light(past_full)
        needs_proxies = start < len(self.layers) - 1 and self.options.skip is None
        proxies = proxy_mask(layout, past_light_valid) if needs_proxies else None
        return Streams(
            layout=layout,
            light_mask=to_backend(light, name, embeds.dtype),
            proxy_mask=None if proxies is None else to_backend(proxies, name, embeds.dtype),
            rope_main=(rope[0][:, :-num_full], rope[1][:, :-num_full]),
            rope_full=(rope[0][:, -num_full:], rope[1][:, -num_full:]),
            natural_keys=natural_keys,
            past_light=past_light,
            keep_hidden=keep_hidden,
            keep_attention=keep_attention,
        )


def _flag(config: Any, kwargs: dict[str, Any], name: str) -> bool:
    """An argument of the call, or what the configuration says."""
    value = kwargs.get(name)
    return bool(getattr(config, name, False) if value is None else value)
