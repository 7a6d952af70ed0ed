"""What the ProxyV layers of a model share: options at building, streams while rows are read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from proxyv.model.layout import SequenceLayout

if TYPE_CHECKING:
    from proxyv.reduction.base import DecoderReduction

__all__ = ["DecoderOptions", "SplitRows", "Streams", "WeightsTap"]


@dataclass(frozen=True)
class DecoderOptions:
    """What a language model has to know about ProxyV.

    Attributes:
        start_layer: first ProxyV layer, None for none.
        side_reduction: r.
        downsample: "bilinear" or "average".
        guided_width: hidden width of the guided update.
        released: positions of the released weights.
        learned_proxies: learned proxies of each crop; None for spatial ones.
        reduction: a method that drops rows inside the decoder; None for none.
        skip: what full tokens go without, see ``skipping.py``; None for proxies.
        image_decides: it depends on the image how many rows of a crop hold a token.
    """

    start_layer: int | None
    side_reduction: int
    downsample: str
    guided_width: int
    released: bool
    learned_proxies: int | None = None
    reduction: DecoderReduction | None = None
    skip: str | None = None
    image_decides: bool = False

    @classmethod
    def of(cls, config: Any) -> DecoderOptions:
        """What a ``ProxyVConfig`` says."""
        method = config.reduction_method
        return cls(
            start_layer=config.start_layer,
            side_reduction=config.side_reduction,
            downsample=config.downsample,
            guided_width=config.guided_width,
            released=config.layout == "released",
            learned_proxies=config.proxies_per_crop if config.proxy_kind == "learned" else None,
            reduction=method if method is not None and method.stage == "decoder" else None,
            skip=config.skip,
            image_decides=config.image_decides,
        )


@dataclass(frozen=True)
class Streams:
    """What the ProxyV layers of one forward pass share.

    Attributes:
        layout: how natural rows, light rows and full rows correspond.
        light_mask: (B, 1, L, K) in the form of the attention function in use.
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
    light_mask: Tensor | BlockMask
    proxy_mask: Tensor | BlockMask | None
    rope_main: tuple[Tensor, Tensor]
    rope_full: tuple[Tensor, Tensor]
    natural_keys: bool
    past_light: Tensor | None = None
    keep_hidden: bool = False
    keep_attention: bool = False

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Streams:
        """The same on another device; models spread over devices move arguments this way."""

        def move(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(move(part) for part in value)
            if isinstance(value, BlockMask):
                return value.to(device)  # type: ignore[arg-type]
            return value.to(device, non_blocking=non_blocking) if hasattr(value, "to") else value

        return Streams(**{f.name: move(getattr(self, f.name)) for f in fields(self)})


class SplitRows(NamedTuple):
    """What one ProxyV layer hands to the next in place of natural rows.

    A tuple, natural rows first, so that checkpointing, hooks that spread a model over devices and
    ``output_hidden_states`` find tensors where they look for them.

    Attributes:
        natural: (B, S, D) where hidden states are asked for, else None.
        main: (B, P+L, D) proxies, then light rows; light rows alone where layers skip.
        full: (B, F, D).
        splats: matrices of learned proxies, None for spatial ones.
    """

    natural: Tensor | None
    main: Tensor
    full: Tensor
    splats: tuple[Tensor, ...] | None


class WeightsTap(nn.Module):
    """Passes attention weights through, so that ``output_attentions`` can record them here."""

    def forward(self, weights: Tensor) -> Tensor:
        """(B, H, S, K) -> the same."""
        return weights
