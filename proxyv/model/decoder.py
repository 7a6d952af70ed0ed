"""The ProxyV decoder layer and the language models that contain it, one for every family.

A family's model is a thin subclass of the stock one. Its layers from ``start_layer`` on are
ProxyV layers: stock layers plus a guided update. Where no image is being read (decoding, text
only) a ProxyV layer runs its stock forward. Where one is, the rows travel in two streams,
``main = [proxy | light]`` (B, P+L, D) and ``full`` (B, F, D): the first ProxyV layer splits the
natural sequence, each hands ``(None, main, full)`` on, and the last joins them again. Keys and
values enter the cache in natural order and never hold a proxy.

Source: paper section 3.2; authors' modified LlamaDecoderLayer. Differs: no S x S mask, streams
    are split and joined once, the last layer updates no full token and makes no proxy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer
from transformers.utils.output_capturing import OutputRecorder

from proxyv.model.guided_update import FreshLinear, GuidedUpdate
from proxyv.model.layout import SequenceLayout
from proxyv.model.masks import light_mask, ordinary_mask, proxy_mask, to_backend
from proxyv.model.proxies import make_spatial_proxies

__all__ = [
    "FAMILIES",
    "DecoderOptions",
    "Family",
    "ProxyVLayerMixin",
    "ProxyVLlamaDecoderLayer",
    "ProxyVLlamaModel",
    "ProxyVTextMixin",
    "Streams",
    "WeightsTap",
    "build_language_model",
]


@dataclass(frozen=True)
class DecoderOptions:
    """What a language model has to know about ProxyV.

    Attributes:
        start_layer: first ProxyV layer, None for none.
        side_reduction: r.
        downsample: "bilinear" or "average".
        guided_width: hidden width of the guided update.
        released: positions of the released weights.
    """

    start_layer: int | None
    side_reduction: int
    downsample: str
    guided_width: int
    released: bool


@dataclass(frozen=True)
class Streams:
    """What the ProxyV layers of one forward pass share.

    Attributes:
        layout: how natural rows, light rows and full rows correspond.
        light_mask: (B, 1, L, K) for the attention function in use.
        proxy_mask: (B, 1, P, P+L[+past]) likewise; None where nothing needs proxies.
        rope_main: cosine and sine, each (B, P+L, rotary width).
        rope_full: the same for the full rows, (B, F, rotary width).
        natural_keys: the light queries' keys are ``[past | natural rows]``, as a cache wants
            them; else ``[light | full]``, which copies less.
        past_light: (B, N) cached rows that proxies may see, with repeats as padding, or None.
        keep_hidden: hand natural rows on as the first output, for ``output_hidden_states``.
        keep_attention: record attention weights, for ``output_attentions``.
    """

    layout: SequenceLayout
    light_mask: Tensor
    proxy_mask: Tensor | None
    rope_main: tuple[Tensor, Tensor]
    rope_full: tuple[Tensor, Tensor]
    natural_keys: bool
    past_light: Tensor | None = None
    keep_hidden: bool = False
    keep_attention: bool = False


class WeightsTap(nn.Module):
    """Passes attention weights through, so that ``output_attentions`` can record them here."""

    def forward(self, weights: Tensor) -> Tensor:
        """(B, H, S, K) -> the same."""
        return weights


def rotate(heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions to (B, H, N, h); widths beyond the rotary one stay as they are."""
    cos, sin = rope[0][:, None], rope[1][:, None]
    width = cos.shape[-1]
    turned, rest = heads[..., :width], heads[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def _project_separate(attn: Any, rows: Tensor, with_query: bool) -> tuple[Any, Any, Any]:
    """Query (or None), key and value (B, N, H*h) of families with one projection for each."""
    query = attn.q_proj(rows) if with_query else None
    return query, attn.k_proj(rows), attn.v_proj(rows)


class ProxyVLayerMixin:
    """Turns a stock decoder layer into a ProxyV layer; put it before the stock class.

    The stock layer must have ``self_attn``, ``mlp``, ``input_layernorm`` and
    ``post_attention_layernorm``. A family that projects or attends otherwise overrides
    ``_project`` and ``_eager_attention``.
    """

    _project: Callable[..., tuple[Any, Any, Any]] = staticmethod(_project_separate)
    _eager_attention: Callable[..., Any] = staticmethod(modeling_llama.eager_attention_forward)
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def _add_proxyv(
        self, config: Any, options: DecoderOptions, is_last: bool, norm_class: type[nn.Module]
    ) -> None:
        """Add the guided update; called at the end of ``__init__``."""
        norm = norm_class(config.hidden_size, eps=config.rms_norm_eps)  # type: ignore[call-arg]
        self.guided_update = GuidedUpdate(config.hidden_size, options.guided_width, norm)
        self.weights_tap = WeightsTap()
        self.side_reduction = options.side_reduction
        self.downsample = options.downsample
        self.is_last = is_last
        if is_last:  # nothing reads what it would write, so it never gets a gradient
            self.guided_update.requires_grad_(False)

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
            hidden_states: natural rows (B, S, D), or ``(natural or None, main, full)`` as the
                ProxyV layer before hands them on.
            *args: passed to the stock layer.
            streams: set while images are being read; None runs the stock layer.
            past_key_values: the cache.
            **kwargs: passed to the stock layer.

        Returns:
            Natural rows (B, S, D) from a stock run and from the last layer, else
            ``(natural or None, main, full)``.
        """
        if streams is None:
            return super().forward(  # type: ignore[misc]
                hidden_states, *args, past_key_values=past_key_values, **kwargs
            )
        main, full = self._enter(hidden_states, streams.layout)
        num_proxies = main.shape[1] - streams.layout.light_index.shape[1]
        main = main + self._attend(main, full, num_proxies, streams, past_key_values)
        main = main + self.mlp(self.post_attention_layernorm(main))
        light = main[:, num_proxies:]
        if self.is_last:
            return streams.layout.join(light, full)
        full = self.guided_update(
            full, main[:, :num_proxies], streams.layout.side, self.side_reduction
        )
        natural = streams.layout.join(light, full) if streams.keep_hidden else None
        return natural, main, full

    def _enter(self, hidden_states: Any, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """The streams as this layer needs them; the last layer needs no proxies."""
        if isinstance(hidden_states, tuple):
            _, main, full = hidden_states
            if self.is_last:
                main = main[:, main.shape[1] - layout.light_index.shape[1] :]
            return main, full
        light, full = layout.split(hidden_states)
        if self.is_last:
            return light, full
        proxies = make_spatial_proxies(full, layout.side, self.side_reduction, self.downsample)
        return torch.cat([proxies, light], dim=1), full

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
    ) -> Tensor:
        """Attention of main rows (B, P+L, D): proxies and light rows, each with its own keys."""
        attn, layout = self.self_attn, streams.layout
        query, key, value = self._project(attn, self.input_layernorm(main), True)
        _, key_full, value_full = self._project(attn, self.input_layernorm(full), False)
        cos, sin = streams.rope_main
        rope = (cos[:, -main.shape[1] :], sin[:, -main.shape[1] :])
        query, key = rotate(self._heads(query), rope), rotate(self._heads(key), rope)
        key_full = rotate(self._heads(key_full), streams.rope_full)
        value, value_full = self._heads(value), self._heads(value_full)
        light_key, light_value = key[:, :, num_proxies:], value[:, :, num_proxies:]
        if streams.natural_keys:
            keys = layout.join(light_key, key_full)
            values = layout.join(light_value, value_full)
            if past_key_values is not None:
                keys, values = past_key_values.update(keys, values, attn.layer_idx)
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
                key = torch.cat([key, _take_keys(keys, streams.past_light)], dim=2)
                value = torch.cat([value, _take_keys(values, streams.past_light)], dim=2)
            proxy_out, _ = self._call_attention(
                query[:, :, :num_proxies], key, value, streams.proxy_mask
            )
            out = torch.cat([proxy_out, out], dim=1)
        return attn.o_proj(out.flatten(2))

    def _call_attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Call the attention function that the configuration names: (B, Q, H, h) and weights."""
        attn = self.self_attn
        name = attn.config._attn_implementation
        function = self._eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        dropout = attn.attention_dropout if attn.training else 0.0
        return function(attn, query, key, value, mask, dropout=dropout, scaling=attn.scaling)


def _take_keys(keys: Tensor, index: Tensor) -> Tensor:
    """(B, H, K, h) and (B, N) -> (B, H, N, h)."""
    index = index[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[-1])
    return keys.gather(2, index)


def _natural_rows(weights: Tensor, layout: SequenceLayout) -> Tensor:
    """Spread the light rows' attention (B, H, L, K) over S natural rows; full rows are zero."""
    B, H, _, K = weights.shape
    rows = weights.new_zeros(B, H, layout.slots.shape[1], K)
    index = layout.light_index[:, None, :, None].expand(-1, H, -1, K)
    return rows.scatter(2, index, weights)


class ProxyVTextMixin:
    """Turns a stock language model into one with ProxyV layers; put it before the stock class.

    Subclasses name the stock layer in ``stock_layer`` and the ProxyV layer in ``proxyv_layer``.
    """

    stock_layer: type[nn.Module]
    proxyv_layer: type[nn.Module]
    config: Any
    layers: nn.ModuleList
    rotary_emb: Any
    embed_tokens: Any
    gradient_checkpointing: bool
    training: bool
    _supports_flash_attn = False
    _supports_flex_attn = False

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
        for index in range(start, depth):
            self.layers.append(self.proxyv_layer(config, index, options))
        self.post_init()  # type: ignore[attr-defined]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FreshLinear):
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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the language model, as the stock one, plus ``layout`` where rows hold images.

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
            past_key_values = DynamicCache(config=self.config)
        if layout is None:
            attention_mask, position_ids = _plain_rows(
                inputs_embeds, attention_mask, position_ids, past_key_values
            )
        else:
            past = _past_length(past_key_values)
            window = _Window.build(inputs_embeds, attention_mask, past)
            if position_ids is None:
                position_ids = window.position_ids()
            position_ids = position_ids + layout.position_shift
            kwargs["streams"] = self._streams(
                layout, window, inputs_embeds, position_ids, past_key_values, kwargs
            )
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

    def _ordinary_mask(
        self,
        layout: SequenceLayout,
        window: _Window,
        embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
    ) -> Tensor | None:
        """What the ordinary layers get: nothing if they can go without, else 2-D or our own."""
        if self.options.released:
            key_length = _key_length(past_key_values, window)
            mask = ordinary_mask(layout, window.real, window.past_valid, key_length)
            return to_backend(mask, self.config._attn_implementation, embeds.dtype)
        return attention_mask if window.needs_mask else None

    def _streams(
        self,
        layout: SequenceLayout,
        window: _Window,
        embeds: Tensor,
        position_ids: Tensor,
        past_key_values: Cache | None,
        kwargs: dict[str, Any],
    ) -> Streams | None:
        """Masks and rotary tables of the ProxyV layers; None for a baseline."""
        start = self.options.start_layer
        if start is None:
            return None
        keep_hidden, keep_attention = (
            _flag(self.config, kwargs, name)
            for name in ("output_hidden_states", "output_attentions")
        )
        natural_keys = past_key_values is not None or keep_attention
        key_length = _key_length(past_key_values, window)
        light = light_mask(layout, window.real, window.past_valid, key_length, natural_keys)
        position_ids = position_ids.expand(embeds.shape[0], -1)
        positions = torch.cat(
            [layout.proxy_positions(position_ids)]
            + [position_ids.gather(1, index) for index in (layout.light_index, layout.full_index)],
            dim=1,
        )
        num_full = layout.full_index.shape[1]
        rope = self.rotary_emb(embeds, position_ids=positions)
        name = self.config._attn_implementation
        past_full = _remember_full_rows(past_key_values, layout, window)
        past_light, past_light_valid = _past_light(past_full, window)
        needs_proxies = start < len(self.layers) - 1
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


@dataclass(frozen=True)
class _Window:
    """Which rows are real, of the new rows and of the cached ones.

    Attributes:
        real: (B, S) bool, the new rows.
        past_valid: (B, past) bool, the cached rows.
        left_padded: some row of the batch has padding before a real row.
    """

    real: Tensor
    past_valid: Tensor
    left_padded: bool

    @classmethod
    def build(cls, embeds: Tensor, attention_mask: Tensor | None, past: int) -> _Window:
        B, S, _ = embeds.shape
        if attention_mask is None:
            real = torch.ones(B, S, dtype=torch.bool, device=embeds.device)
            return cls(real, real.new_ones(B, past), False)
        if attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.dim()} dimensions: with images it must be "
                "(B, tokens)"
            )
        if attention_mask.shape[1] < past + S:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} tokens, but there are {past} "
                f"cached and {S} new ones: it must cover both"
            )
        mask = attention_mask.to(embeds.device).bool()[:, : past + S]
        left = bool((mask[:, 1:] & ~mask[:, :-1]).any())
        return cls(mask[:, past:], mask[:, :past], left)

    @property
    def needs_mask(self) -> bool:
        """Whether causal attention alone would show a real row something it must not see."""
        return self.left_padded or self.past_valid.shape[1] > 0

    def position_ids(self) -> Tensor:
        """(B, S) positions counted over real tokens only, as generation counts them."""
        valid = torch.cat([self.past_valid, self.real], dim=1).long()
        return (valid.cumsum(dim=1) - 1).clamp(min=0)[:, self.past_valid.shape[1] :]


def _flag(config: Any, kwargs: dict[str, Any], name: str) -> bool:
    """An argument of the call, or what the configuration says."""
    value = kwargs.get(name)
    return bool(getattr(config, name, False) if value is None else value)


def _past_length(past_key_values: Cache | None) -> int:
    return 0 if past_key_values is None else int(past_key_values.get_seq_length())


def _plain_rows(
    embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Mask and positions of rows without images, for the stock model.

    A mask that hides nothing a real row could see is dropped; positions of rows padded on the
    left are counted over real tokens. Prepared masks and decoding steps are left as they are.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return attention_mask, position_ids
    past = _past_length(past_key_values)
    if past and position_ids is not None:
        return attention_mask, position_ids
    window = _Window.build(embeds, attention_mask, past)
    if position_ids is None and window.left_padded:
        position_ids = window.position_ids()
    return (attention_mask if window.needs_mask else None), position_ids


def _key_length(past_key_values: Cache | None, window: _Window) -> int:
    """How many keys the attention of a layer will get."""
    length = window.real.shape[1]
    if past_key_values is None:
        return length
    return int(past_key_values.get_mask_sizes(length, 0)[0])


def _remember_full_rows(
    past_key_values: Cache | None, layout: SequenceLayout, window: _Window
) -> Tensor | None:
    """Note on the cache which of its rows are full tokens; proxies of later turns ask for it.

    Returns:
        (B, past) True where a row cached before is a full token; None without a cache.

    Raises:
        ValueError: the cache was filled with another batch size.
    """
    if past_key_values is None:
        return None
    B, past = window.past_valid.shape
    known = getattr(past_key_values, "proxyv_full_rows", None)
    if known is None:
        known = window.past_valid.new_zeros(B, 0)
    if known.shape[0] != B:
        raise ValueError(
            f"the cache was filled with images in a batch of {known.shape[0]}, now the batch is "
            f"{B}: start a new cache"
        )
    known = nn.functional.pad(known[:, :past], (0, past - min(past, known.shape[1])))
    new = layout.natural_index >= layout.light_index.shape[1]
    past_key_values.proxyv_full_rows = torch.cat([known, new], dim=1)  # type: ignore[attr-defined]
    return known


def _past_light(past_full: Tensor | None, window: _Window) -> tuple[Tensor | None, Tensor | None]:
    """Cached newline and text rows, (B, N) padded, and which entries are real; None if none."""
    if past_full is None:
        return None, None
    light = window.past_valid & ~past_full
    most = int(light.sum(dim=1).max()) if light.shape[1] else 0
    if most == 0:
        return None, None
    index = light.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return index, light.gather(1, index)


class ProxyVLlamaDecoderLayer(ProxyVLayerMixin, LlamaDecoderLayer):
    """A ProxyV layer of the Llama family (Llama, Vicuna, Llama 3, SmolLM2)."""

    def __init__(self, config: LlamaConfig, layer_idx: int, options: DecoderOptions) -> None:
        super().__init__(config, layer_idx)
        is_last = layer_idx == config.num_hidden_layers - 1
        self._add_proxyv(config, options, is_last, modeling_llama.LlamaRMSNorm)


class ProxyVLlamaModel(ProxyVTextMixin, LlamaModel):
    """A Llama whose layers from ``start_layer`` on are ProxyV layers."""

    stock_layer = LlamaDecoderLayer
    proxyv_layer = ProxyVLlamaDecoderLayer
    _no_split_modules = ["LlamaDecoderLayer", "ProxyVLlamaDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": LlamaDecoderLayer,
        "attentions": [
            OutputRecorder(LlamaAttention, index=1),
            OutputRecorder(WeightsTap, index=0),
        ],
    }


@dataclass(frozen=True)
class Family:
    """One row of the table of language-model families.

    Attributes:
        model: the language model with ProxyV layers.
    """

    model: type[Any]


FAMILIES: dict[str, Family] = {"llama": Family(model=ProxyVLlamaModel)}


def build_language_model(text_config: PreTrainedConfig, options: DecoderOptions) -> Any:
    """Build the language model of the family that ``text_config`` belongs to.

    Args:
        text_config: the stock configuration of the family.
        options: what ProxyV adds.

    Raises:
        ValueError: no family of that name.
    """
    family = FAMILIES.get(text_config.model_type)
    if family is None:
        raise ValueError(
            f"text_config.model_type={text_config.model_type!r} has no ProxyV layers: use one of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return family.model._from_config(text_config, options=options)
