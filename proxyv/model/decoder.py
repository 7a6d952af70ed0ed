"""The ProxyV decoder layer, one for every family of language models.

A ProxyV layer is a stock layer plus a guided update. Where no image is being read (decoding, text
only) it runs its stock forward. Where one is, the rows travel in two streams,
``main = [proxy | light]`` (B, P+L, D) and ``full`` (B, F, D): the first ProxyV layer splits the
natural sequence, each hands ``SplitRows`` on, and the last joins them again. Keys and values
enter the cache in natural order and never hold a proxy.

Source: paper section 3.2; authors' modified LlamaDecoderLayer. Differs: no S x S mask, streams
    are split and joined once, the last layer updates no full token and makes no proxy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from proxyv.model.cache import extend_cache
from proxyv.model.guided_update import GuidedUpdate
from proxyv.model.layout import SequenceLayout, take_rows
from proxyv.model.masks import masked_attention
from proxyv.model.passes import normalise, rotate
from proxyv.model.proxies import (
    ProxyInitializer,
    join_groups,
    make_spatial_proxies,
    split_groups,
)
from proxyv.model.streams import DecoderOptions, SplitRows, Streams, WeightsTap

__all__ = ["ProxyVLayerMixin"]


class ProxyVLayerMixin:
    """Turns a stock decoder layer into a ProxyV layer; put it before the stock class.

    The stock layer must have ``self_attn``, ``mlp``, ``input_layernorm`` and
    ``post_attention_layernorm``. A family names its stock attention in ``_eager_attention``;
    one that projects otherwise or drops residuals overrides ``_project``, ``_after_attention``
    or ``_after_mlp``.

    Args:
        config: the stock configuration of the family.
        layer_idx: which layer this is.
        options: what ProxyV adds.
    """

    _eager_attention: Callable[..., Any]
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any
    training: bool

    def __init__(self, config: Any, layer_idx: int, options: DecoderOptions) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.is_last = layer_idx == config.num_hidden_layers - 1
        for added in self._add_modules(config, options):
            if self.is_last:  # nothing reads what it would write, so it never gets a gradient
                added.requires_grad_(False)
        self.weights_tap = WeightsTap()
        self.side_reduction = options.side_reduction
        self.downsample = options.downsample

    def _add_modules(self, config: Any, options: DecoderOptions) -> list[nn.Module]:
        """Build the modules that the stock layer does not have, and list them."""
        norm = type(self.input_layernorm)(config.hidden_size, eps=config.rms_norm_eps)
        self.guided_update = GuidedUpdate(config.hidden_size, options.guided_width, norm)
        self.proxy_initializer: ProxyInitializer | None = None
        if options.learned_proxies is None or self.self_attn.layer_idx != options.start_layer:
            return [self.guided_update]
        self.proxy_initializer = ProxyInitializer(
            config.hidden_size, options.guided_width, options.learned_proxies
        )
        return [self.guided_update, self.proxy_initializer]

    def _project(self, rows: Tensor, with_query: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """Query (or None), key and value, each (B, H, N, h), of normalised rows (B, N, D).

        The projections are called, never read: adapters on them act, and sharded weights are
        gathered.
        """
        attn = self.self_attn
        query = self._heads(attn.q_proj(rows)) if with_query else None
        return query, self._heads(attn.k_proj(rows)), self._heads(attn.v_proj(rows))

    def _after_attention(self, rows: Tensor) -> Tensor:
        """What the family does to attention's output before adding it, (B, N, D) -> the same."""
        return rows

    def _after_mlp(self, rows: Tensor) -> Tensor:
        """What the family does to the MLP's output before adding it, (B, N, D) -> the same."""
        return rows

    def forward(
        self,
        hidden_states: Any,
        *args: Any,
        streams: Streams | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the layer.

        Args:
            hidden_states: natural rows (B, S, D), or what the ProxyV layer before hands on.
            *args: passed to the stock layer.
            streams: set while images are being read; None runs the stock layer.
            past_key_values: the cache.
            **kwargs: passed to the stock layer.

        Returns:
            Natural rows (B, S, D) from a stock run and from the last layer, else ``SplitRows``.
        """
        if streams is None:
            rows = super().forward(  # type: ignore[misc]
                hidden_states, *args, past_key_values=past_key_values, **kwargs
            )
            return self._with_zero_gradients(rows)
        main, full, splats = self._enter(hidden_states, streams.layout)
        num_proxies = main.shape[1] - streams.layout.light_index.shape[1]
        attended, values = self._attend(main, full, num_proxies, streams, past_key_values)
        main = main + self._after_attention(attended)
        main = main + self._after_mlp(self.mlp(self.post_attention_layernorm(main)))
        light = main[:, num_proxies:]
        if self.is_last:
            return streams.layout.join(light, full)
        full = self._update_full(full, values, main[:, :num_proxies], streams, splats)
        natural = streams.layout.join(light, full) if streams.keep_hidden else None
        return SplitRows(natural, main, full, splats)

    def _with_zero_gradients(self, rows: Tensor) -> Tensor:
        """The same rows, from which gradients reach the new modules too, as zeros.

        Data-parallel training waits for the same gradients from every process, also from one
        whose batch happens to hold no image. The modules are called, on a row of zeros, inside
        their layer: what shards weights gathers them there and nowhere else.
        """
        if self.is_last or not (self.training and torch.is_grad_enabled()):
            return rows
        return rows + 0 * self._run_added(rows.new_zeros(1, 1, rows.shape[-1])).sum()

    def _run_added(self, row: Tensor) -> Tensor:
        """Run the modules that the stock layer does not have, on a crop of one row (1, 1, D)."""
        proxies, splat = row, row.new_zeros(1, 1, 1, 1)
        if self.proxy_initializer is not None:
            proxies, splat = self.proxy_initializer(row, 1)
        return self.guided_update(row, proxies, (), 1, (splat,))

    def _update_full(
        self,
        full: Tensor,
        values: Tensor,
        proxies: Tensor,
        streams: Streams,
        splats: tuple[Tensor, ...] | None,
    ) -> Tensor:
        """Full rows (B, F, D) as they leave the layer.

        Args:
            full: as they entered it.
            values: (B, K, F, h) their attention values.
            proxies: (B, P, D) as they leave the layer.
            streams: what the layers share.
            splats: of learned proxies.
        """
        return self.guided_update(full, proxies, streams.layout.groups, self.side_reduction, splats)

    def _enter(
        self, hidden_states: Any, layout: SequenceLayout
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None]:
        """The streams as this layer needs them; the last layer needs no proxies."""
        if isinstance(hidden_states, SplitRows):
            main = hidden_states.main
            if self.is_last:
                main = main[:, main.shape[1] - layout.light_index.shape[1] :]
            return main, hidden_states.full, hidden_states.splats
        light, full = layout.split(hidden_states)
        if self.is_last:
            return light, full, None
        proxies, splats = self._make_proxies(full, layout)
        return torch.cat([proxies, light], dim=1), full, splats

    def _make_proxies(
        self, full: Tensor, layout: SequenceLayout
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Proxies (B, P, D) of full rows (B, F, D), and the splat matrices of learned ones."""
        groups, lengths = layout.groups, [group.num_full for group in layout.groups]
        parts = split_groups(full, lengths)
        if self.proxy_initializer is None:
            spatial = [
                make_spatial_proxies(part, group.side, self.side_reduction, self.downsample)
                for part, group in zip(parts, groups, strict=True)
            ]
            return join_groups(spatial), None
        # Crops that only pad have proxies that only pad, so tokens need a mask within crops only.
        valid: Sequence[Tensor | None] = [None] * len(groups)
        if layout.ragged:
            valid = layout.full_valid.split(lengths, dim=1)
        learned = [
            self.proxy_initializer(part, group.crop_tokens, real)
            for part, group, real in zip(parts, groups, valid, strict=True)
        ]
        return join_groups([proxies for proxies, _ in learned]), tuple(s for _, s in learned)

    def _heads(self, rows: Tensor) -> Tensor:
        """(B, N, H*h) -> (B, H, N, h)."""
        return rows.unflatten(-1, (-1, self.self_attn.head_dim)).transpose(1, 2)

    def _attend(
        self,
        main: Tensor,
        full: Tensor,
        num_proxies: int,
        streams: Streams,
        past_key_values: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of main rows (B, P+L, D): proxies and light rows, each with its own keys.

        Returns:
            (B, P+L, D), and the full rows' values (B, K, F, h).
        """
        attn, layout = self.self_attn, streams.layout
        query, key, value = self._project(self.input_layernorm(main), True)
        _, key_full, value_full = self._project(normalise(self.input_layernorm, full), False)
        assert query is not None, "a projection with queries gave none"
        cos, sin = streams.rope_main
        rope = (cos[:, -main.shape[1] :], sin[:, -main.shape[1] :])
        query, key = rotate(query, rope), rotate(key, rope)
        key_full = rotate(key_full, streams.rope_full)
        light_key, light_value = key[:, :, num_proxies:], value[:, :, num_proxies:]
        if streams.natural_keys:
            keys = layout.join(light_key, key_full)
            values = layout.join(light_value, value_full)
            if past_key_values is not None:
                keys, values = extend_cache(past_key_values, keys, values, attn.layer_idx)
        else:
            keys = torch.cat([light_key, key_full], dim=2)
            values = torch.cat([light_value, value_full], dim=2)
        out, weights = self._call_attention(
            query[:, :, num_proxies:], keys, values, streams.light_mask
        )
        if streams.keep_attention and weights is not None:
            self.weights_tap(_natural_rows(weights, layout))
        if num_proxies:
            if streams.past_light is not None:
                key = torch.cat([key, take_rows(keys, streams.past_light)], dim=2)
                value = torch.cat([value, take_rows(values, streams.past_light)], dim=2)
            proxy_out, _ = self._call_attention(
                query[:, :, :num_proxies], key, value, streams.proxy_mask
            )
            out = torch.cat([proxy_out, out], dim=1)
        return attn.o_proj(out.flatten(2)), value_full

    def _call_attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Call the attention function that the configuration names: (B, Q, H, h) and weights."""
        attn = self.self_attn
        name = masked_attention(attn.config._attn_implementation)
        function = self._eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        dropout = attn.attention_dropout if attn.training else 0.0
        out, weights = function(
            attn, query, key, value, mask, dropout=dropout, scaling=attn.scaling
        )
        return out, weights if name == "eager" else None


def _natural_rows(weights: Tensor, layout: SequenceLayout) -> Tensor:
    """Spread the light rows' attention (B, H, L, K) over S natural rows; full rows are zero."""
    B, H, _, K = weights.shape
    rows = weights.new_zeros(B, H, layout.slots.shape[1], K)
    index = layout.light_index[:, None, :, None].expand(-1, H, -1, K)
    return rows.scatter(2, index, weights)
