"""The model configuration: LLaVA-NeXT's, plus what ProxyV adds, all of it validated.

Everything a stock LLaVA-NeXT configuration holds keeps its name and meaning, and ``text_config``
stays the stock configuration of the language model's family.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import LlavaNextConfig

from proxyv.cli import nearest, require_one_of
from proxyv.reduction import Reduction, build_reduction, check_combination

__all__ = [
    "DOWNSAMPLE_MODES",
    "LAYOUTS",
    "OPTIONS",
    "PACKINGS",
    "PROXY_KINDS",
    "PROXY_POSITIONS",
    "SKIPS",
    "ProxyVConfig",
]

SKIPS = ("atn", "atn_ffn")
PROXY_KINDS = ("spatial", "learned")
DOWNSAMPLE_MODES = ("bilinear", "average")
LAYOUTS = ("natural", "released")
PROXY_POSITIONS = ("consecutive", "block")
PACKINGS = ("crops", "llava_next")


class ProxyVConfig(LlavaNextConfig):
    """Configuration of a ProxyV model, or of the baseline without proxies.

    Args:
        start_layer: index of the first ProxyV decoder layer, from 0 to the last layer; None
            builds the baseline, every layer an ordinary one.
        skip: what full tokens go without from ``start_layer`` on, in place of proxies that compute
            for them, as in the paper's redundancy study: "atn" is their attention, "atn_ffn" their
            attention and FFN, replaced by a small MLP; None is ProxyV.
        side_reduction: factor r by which a crop's side shrinks; a crop of s x s full tokens gets
            (s / r) x (s / r) proxies. Must divide s where proxies are spatial.
        proxy_kind: how proxies are made; "spatial" downsamples each crop, "learned" lets learned
            queries attend to it.
        learned_proxies: proxies of each crop where they are learned; None for n // r**2 of a crop
            of n full tokens, those that a reduction leaves. Another reduction that a saved model
            is used with leaves their number as it is.
        downsample: "bilinear" (no antialiasing: what the released weights expect) or "average"
            (mean of each r x r block).
        proxy_positions: rotary positions of proxies; "consecutive" counts on from their image's
            first token, as the paper does, "block" gives a spatial proxy that of the middle token
            of the block it stands for. What proxies see is the same.
        layout: "natural" (each newline follows its crop) or "released" (positions of the released
            weights, where the newline of every crop but the first sits one crop early).
        guided_ratio: hidden width of the guided update as a share of the model width; None takes
            the authors' rule, 1/4 from a width of 1024 on and 1/2 below. It is
            the width of the MLP of ``skip="atn_ffn"`` too, by default always 1/4.
        packing: how an image becomes tokens; "crops" puts the crops one after another, each
            followed by one newline token. "llava_next" is what stock LLaVA-NeXT checkpoints
            expect: the thumbnail, then the tiles as one picture without what only pads, a
            newline after each row. It is for the baseline: its rows are no crops that proxies
            could be made of.
        reduction: a token-reduction method and its options, such as ``{"method": "fastv",
            "layer": 2, "ratio": 0.5}``; see ``proxyv.reduction``. None keeps every token.
        **kwargs: the fields of ``LlavaNextConfig``.

    Raises:
        ValueError: an option outside the values above, a reduction that does not divide the crop
            side, a start layer that the language model does not have, packing "llava_next" with a
            start layer, released positions or a reduction, or a token-reduction method that does
            not go with the other options.
    """

    model_type = "proxyv"
    if TYPE_CHECKING:  # both are configurations once the object is made
        vision_config: Any
        text_config: Any

    start_layer: int | None = None
    skip: str | None = None
    side_reduction: int = 4
    proxy_kind: str = "spatial"
    learned_proxies: int | None = None
    downsample: str = "bilinear"
    proxy_positions: str = "consecutive"
    layout: str = "natural"
    guided_ratio: float | None = None
    packing: str = "crops"
    reduction: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:  # transformers keeps what it does not know, and builds a baseline
            if difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.85):
                raise ValueError(nearest("option", name, OPTIONS))
        super().__post_init__(**kwargs)
        self.check_options()

    @property
    def side(self) -> int:
        """Crop side s in patches: a crop is s * s full tokens."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def reduction_method(self) -> Reduction | None:
        """The token-reduction method with its options."""
        return None if self.reduction is None else build_reduction(self.reduction)

    @property
    def crop_tokens(self) -> int:
        """Full tokens of one crop in the sequence: s * s, or what a reduction leaves of them.

        Where the image decides what is left, s * s rows are reserved.
        """
        method = self.reduction_method
        tokens = None if method is None else method.tokens_per_crop(self.side**2)
        return self.side**2 if tokens is None else tokens

    @property
    def image_decides(self) -> bool:
        """Whether it depends on the image how many tokens of a crop the reduction leaves."""
        method = self.reduction_method
        return method is not None and method.tokens_per_crop(self.side**2) is None

    @property
    def crop_side(self) -> int | None:
        """Side of one crop's full tokens as they enter the decoder; None if they are no grid."""
        method = self.reduction_method
        if method is None or method.stage == "decoder":
            return self.side
        return math.isqrt(self.crop_tokens) if method.keeps_grid else None

    @property
    def rows_per_crop(self) -> int:
        """Rows that one crop takes in the sequence: its full tokens and its newline."""
        return self.crop_tokens + 1

    @property
    def proxies_per_crop(self) -> int:
        """Proxies of one crop that is not pooled."""
        return self.num_proxies(self.crop_side)

    def num_proxies(self, side: int | None) -> int:
        """Proxies of a crop of ``side`` x ``side`` tokens: (side / r) ** 2, or the learned ones.

        Layers that skip have none. ``side`` is None where tokens are no grid.
        """
        if self.skip is not None:
            return 0
        if self.proxy_kind == "spatial":
            return 0 if side is None else (side // self.side_reduction) ** 2
        if self.learned_proxies is not None:
            return self.learned_proxies
        return self.crop_tokens // self.side_reduction**2

    @property
    def proxy_block(self) -> int | None:
        """Side of the blocks in whose middles proxies sit.

        None where their positions count on, and for models without proxies, which ignore this as
        they do the other options of proxies.
        """
        if self.start_layer is None or self.skip is not None:
            return None
        return self.side_reduction if self.proxy_positions == "block" else None

    @property
    def guided_width(self) -> int:
        """Hidden width h of the guided update, or of the MLP of ``skip="atn_ffn"``."""
        width = self.text_config.hidden_size
        if self.guided_ratio is None:
            return width // 4 if width >= 1024 or self.skip == "atn_ffn" else width // 2
        return max(1, round(width * self.guided_ratio))

    @property
    def head_width(self) -> int:
        """Width of an attention head of the language model."""
        text = self.text_config
        return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def check_options(self) -> None:
        """Check the ProxyV options; called on construction and again by the model.

        Raises:
            ValueError: naming the option, its value and what is allowed.
        """
        if self.skip is not None:
            require_one_of("skip", self.skip, SKIPS)
        require_one_of("proxy_kind", self.proxy_kind, PROXY_KINDS)
        require_one_of("downsample", self.downsample, DOWNSAMPLE_MODES)
        require_one_of("proxy_positions", self.proxy_positions, PROXY_POSITIONS)
        require_one_of("layout", self.layout, LAYOUTS)
        require_one_of("packing", self.packing, PACKINGS)
        if not _is_int(self.side_reduction) or self.side_reduction < 1:
            raise ValueError(
                f"side_reduction must be a positive integer, got {self.side_reduction!r}"
            )
        self._check_learned_proxies()
        if self.skip is not None and self.proxy_kind != "spatial":
            raise ValueError(
                f"skip={self.skip!r} has no proxies, but proxy_kind={self.proxy_kind!r}: "
                "leave proxy_kind out, or set skip to null"
            )
        ratio = self.guided_ratio
        if ratio is not None and not (isinstance(ratio, (int, float)) and 0 < ratio <= 4):
            raise ValueError(
                f"guided_ratio must be a number above 0 and at most 4, or null, got {ratio!r}"
            )
        if self.packing == "llava_next" and self.start_layer is not None:
            raise ValueError(
                f"packing='llava_next' is for the baseline, but start_layer={self.start_layer!r}: "
                "set start_layer to null, or packing to 'crops'"
            )
        if self.packing == "llava_next" and self.layout != "natural":
            raise ValueError(
                f"packing='llava_next' has no newline after a crop that layout={self.layout!r} "
                "could move: set layout to 'natural', or packing to 'crops'"
            )
        self._check_reduction()
        if self.start_layer is None:
            return
        layers = self.text_config.num_hidden_layers
        if not _is_int(self.start_layer) or not 0 <= self.start_layer < layers:
            raise ValueError(
                f"start_layer={self.start_layer!r} is not a layer of the language model: use an "
                f"integer from 0 to {layers - 1} (it has {layers} layers), or null for the baseline"
            )
        self.check_crop_side(self.crop_side)

    def _check_reduction(self) -> None:
        """Check the token-reduction method against the rest."""
        if self.reduction is None:
            return
        if not isinstance(self.reduction, Mapping):
            raise ValueError(
                f"reduction must be a mapping such as {{'method': 'fastv'}}, or null, got "
                f"{self.reduction!r}"
            )
        method = build_reduction(self.reduction)
        if self.packing != "crops":
            raise ValueError(
                f"packing={self.packing!r} cannot go with reduction method {method.name!r}: its "
                "rows are no crops that could be reduced. Set packing to 'crops'"
            )
        if self.layout == "released" and (self.image_decides or method.stage == "decoder"):
            raise ValueError(
                f"layout='released' cannot go with reduction method {method.name!r}: visibility "
                "goes by position there, which dropping rows would break. Set layout to "
                "'natural', or use a method with a fixed number of tokens before the decoder"
            )
        check_combination(
            method,
            num_patches=self.side**2,
            num_layers=self.text_config.num_hidden_layers,
            start_layer=self.start_layer,
            proxy_kind=self.proxy_kind if self.skip is None else None,
        )

    def check_crop_side(self, side: int | None) -> None:
        """Check that crops of ``side`` x ``side`` full tokens, or of no grid, can have proxies.

        Raises:
            ValueError: a reduction that does not divide the side, or leaves no proxy.
        """
        if self.start_layer is None or self.skip is not None:
            return
        if self.proxy_kind == "spatial" and side is not None and side % self.side_reduction != 0:
            divisors = [r for r in range(1, side + 1) if side % r == 0]
            left = f" that reduction={self.reduction} leaves" if self.reduction else ""
            raise ValueError(
                f"side_reduction={self.side_reduction} does not divide the crop side of "
                f"{side} tokens{left}: use one of {divisors}"
            )
        if self.num_proxies(side) < 1:
            tokens = self.crop_tokens if side is None else side**2
            raise ValueError(
                f"side_reduction={self.side_reduction} leaves a crop of {tokens} tokens no proxy: "
                f"use at most {math.isqrt(tokens)}, or set learned_proxies"
            )

    def _check_learned_proxies(self) -> None:
        """Check how many learned proxies a crop has."""
        count = self.learned_proxies
        if count is not None and (not _is_int(count) or count < 1):
            raise ValueError(f"learned_proxies must be a positive integer or null, got {count!r}")
        if self.proxy_positions == "block" and self.proxy_kind != "spatial":
            raise ValueError(
                f"proxy_positions='block' needs proxy_kind 'spatial', but it is "
                f"{self.proxy_kind!r}: learned proxies stand for no block, use 'consecutive'"
            )
        if count is not None and self.proxy_kind != "learned":
            raise ValueError(
                f"learned_proxies={count} needs proxy_kind 'learned', but it is "
                f"{self.proxy_kind!r}: spatial proxies follow from side_reduction"
            )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


OPTIONS = tuple(ProxyVConfig.__annotations__)
"""The fields that ``ProxyVConfig`` adds to LLaVA-NeXT's."""
