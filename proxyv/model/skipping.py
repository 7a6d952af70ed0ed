"""Layers that skip the computation of full tokens, as in the redundancy study.

They run like ProxyV layers without proxies: full tokens are keys and values of the light rows,
and no queries. What becomes of a full token x, with xn = input_layernorm(x):

* ``atn``: ``x <- x + W_o v(xn)``, ``x <- x + FFN(norm(x))``. No attention, but what attention
  would give a token that sees only itself; so masking all other keys at inference is the same.
* ``atn_ffn``: ``x <- x + W2 SiLU(W1 xn)`` in place of attention and FFN, no biases.

Source: paper section 3.1, tables 1 and 2. Differs: nothing known; the paper prints FLOPs (17.7 and
    79.9 % saved from layer 0 on with Vicuna-7B), and these two forms give them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from proxyv.model.decoder import ProxyVLayerMixin
from proxyv.model.linear import FreshLinear
from proxyv.model.streams import DecoderOptions, SplitRows, Streams

__all__ = ["LightMLP", "SkipAttentionMixin", "SkipLayerMixin", "layer_that_skips"]


class LightMLP(nn.Module):
    """D -> h -> D with a SiLU between, no biases.

    Args:
        hidden_size: model width D.
        width: hidden width h.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.input_proj = FreshLinear(hidden_size, width)
        self.output_proj = FreshLinear(width, hidden_size)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.output_proj(nn.functional.silu(self.input_proj(rows)))


class _WithoutProxies(ProxyVLayerMixin):
    """A layer whose main stream holds light rows only.

    Its class is made by ``layer_that_skips``, so pickles name what that was asked for.
    """

    made_from: tuple[Any, str]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_unpickled, self.made_from, *reduced[2:])

    def _add_modules(self, config: Any, options: DecoderOptions) -> list[nn.Module]:
        return []

    def _enter(self, hidden_states: Any, layout: Any) -> tuple[Tensor, Tensor, None]:
        if isinstance(hidden_states, SplitRows):
            return hidden_states.main, hidden_states.full, None
        light, full = layout.split(hidden_states)
        return light, full, None

    def _run_added(self, row: Tensor) -> Tensor:
        return row


class SkipAttentionMixin(_WithoutProxies):
    """Full tokens skip attention (``atn``); put it before a family's ProxyV layer."""

    def _update_full(
        self, full: Tensor, values: Tensor, proxies: Tensor, streams: Streams, splats: Any
    ) -> Tensor:
        groups = self.self_attn.num_key_value_groups
        own = values.repeat_interleave(groups, dim=1).transpose(1, 2).flatten(2)  # (B, F, H*h)
        full = full + self._after_attention(self.self_attn.o_proj(own))
        return full + self._after_mlp(self.mlp(self.post_attention_layernorm(full)))


class SkipLayerMixin(_WithoutProxies):
    """Full tokens skip attention and FFN (``atn_ffn``); put it before a family's ProxyV layer."""

    def _add_modules(self, config: Any, options: DecoderOptions) -> list[nn.Module]:
        self.light_mlp = LightMLP(config.hidden_size, options.guided_width)
        return [self.light_mlp]

    def _run_added(self, row: Tensor) -> Tensor:
        return self.light_mlp(row)

    def _update_full(
        self, full: Tensor, values: Tensor, proxies: Tensor, streams: Streams, splats: Any
    ) -> Tensor:
        return full + self.light_mlp(self.input_layernorm(full))


_MIXINS: dict[str, type[ProxyVLayerMixin]] = {
    "atn": SkipAttentionMixin,
    "atn_ffn": SkipLayerMixin,
}


@cache
def layer_that_skips(proxyv_layer: type[Any], skip: str | None) -> type[Any]:
    """A family's ProxyV layer, or a thin subclass of it that skips.

    Args:
        proxyv_layer: the ProxyV layer of the family.
        skip: one of ``proxyv.config.SKIPS``, or None.
    """
    if skip is None:
        return proxyv_layer
    mixin = _MIXINS[skip]
    name = proxyv_layer.__name__.replace("ProxyV", mixin.__name__.removesuffix("Mixin"), 1)
    body = {"__doc__": mixin.__doc__, "__module__": __name__, "made_from": (proxyv_layer, skip)}
    return type(name, (mixin, proxyv_layer), body)


def _unpickled(proxyv_layer: Any, skip: str) -> Any:
    """A layer without its state, which the pickle brings."""
    made: Any = layer_that_skips(proxyv_layer, skip)
    return made.__new__(made)
