"""FLOPs of a forward pass, counted on paper: multiply-adds times two, biases and norms left out.

Two conventions. ``run_flops`` is what this code executes: guided updates folded or not, nothing
but keys and values for full tokens in the last layer, and logits of as many rows
as are asked for. With eager attention it is what torch's ``FlopCounterMode`` counts, to the last
operation. ``paper_flops`` is what the paper's table counts: decoder layers only, attention as
S x S, guided updates unfolded, the last layer like the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from proxyv.model.reduction_flops import (
    full_tokens,
    packer_flops,
    scoring_flops,
    tower_method_flops,
)
from proxyv.reduction.base import ProjectorReduction

__all__ = ["RowTokens", "kv_cache_bytes", "layers_flops", "paper_flops", "run_flops"]


@dataclass(frozen=True)
class RowTokens:
    """What a row of the batch holds.

    Attributes:
        crops: of all its images.
        text: tokens that are not of images.
        past: tokens, not of images, that a cache holds already; such a row brings no image.
        kept: full tokens of each crop where the image decides what a method leaves of it; of no
            meaning for other models.
        past_crops: crops in the cache beside ``past``, in each layer what a method left of them.
    """

    crops: int
    text: int
    past: int = 0
    kept: int | None = None
    past_crops: int = 0

    def __post_init__(self) -> None:
        for name in ("crops", "text", "past", "past_crops"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if self.crops and (self.past or self.past_crops):
            raise ValueError(
                f"crops={self.crops} on top of past={self.past} tokens and "
                f"past_crops={self.past_crops} is not counted: set crops or both others to 0"
            )

    def cached(self) -> RowTokens:
        """One more token, after all of this row has been read."""
        past, crops = self.past + self.text, self.past_crops + self.crops
        return dataclasses.replace(self, crops=0, text=1, past=past, past_crops=crops)


@dataclass(frozen=True)
class _Shape:
    """Widths of a language model, and rows of a sequence, as in ``layout.py``.

    Attributes:
        width: D.
        query: width of all query heads.
        key: width of all key heads, Dkv.
        ffn: I.
        hidden: h of the guided update.
        full: F.
        light: L, newline and text rows.
        proxies: P.
        crop_proxies: proxies of each crop.
        past: cached rows, which differ by layer.
    """

    width: int
    query: int
    key: int
    ffn: int
    hidden: int
    full: int
    light: int
    proxies: int
    crop_proxies: int
    past: int = 0

    @classmethod
    def of(cls, config: Any, row: RowTokens) -> _Shape:
        """Rows as they enter the first layer."""
        if config.packing != "crops":
            raise ValueError(
                f"packing={config.packing!r}: FLOPs are counted for packing 'crops' only, where "
                "tokens follow from the number of crops"
            )
        text = config.text_config
        tokens = _tokens_of_crop(config, row)
        per_crop = config.proxies_per_crop if config.start_layer is not None else 0
        return cls(
            width=text.hidden_size,
            query=config.head_width * text.num_attention_heads,
            key=config.head_width * text.num_key_value_heads,
            ffn=text.intermediate_size,
            hidden=config.guided_width,
            full=row.crops * tokens,
            light=row.crops + row.text,
            proxies=row.crops * per_crop,
            crop_proxies=per_crop,
        )

    @property
    def natural(self) -> int:
        """S, the rows of the natural sequence."""
        return self.full + self.light

    def linear(self) -> int:
        """Projections and FFN of one row."""
        attention = 2 * self.width * self.query + 2 * self.width * self.key
        return 2 * (attention + 3 * self.width * self.ffn)

    def keys(self, fused: bool) -> int:
        """Keys and values of one full row; a fused projection computes its query as well."""
        return 2 * self.width * (2 * self.key + (self.query if fused else 0))

    def skipping(self, skip: str) -> int:
        """What one full row costs beside its keys and values in a layer that skips the rest."""
        if skip == "atn_ffn":
            return 4 * self.width * self.hidden
        return 2 * (self.width * self.query + 3 * self.width * self.ffn)

    def attention(self, pairs: int) -> int:
        """Scores and mixing of so many pairs of query and key."""
        return 4 * pairs * self.query


def _tokens_of_crop(config: Any, row: RowTokens) -> int:
    """Full tokens of one crop as they enter the first layer."""
    return row.kept if row.kept and config.image_decides else config.crop_tokens


def _cached_rows(config: Any, row: RowTokens) -> list[int]:
    """Rows that the cache holds in each layer before the row is read."""
    full = row.past_crops * _tokens_of_crop(config, row)
    layers = config.text_config.num_hidden_layers
    left = full_tokens(config.reduction_method, full, layers)
    return [row.past + row.past_crops + tokens for tokens in left]


def paper_flops(config: Any, row: RowTokens, *, fused_qkv: bool = False) -> int:
    """FLOPs of the decoder layers as the paper counts them.

    Args:
        config: a ``ProxyVConfig``.
        row: what is read; without images every layer is an ordinary one.
        fused_qkv: the model projects to query, key and value by one matrix, and the authors' code
            calls it twice in every layer, the baseline's too: for the rows with queries and for
            those with keys, each time keeping a part. An ordinary layer then costs
            2S(D^2+2D Dkv) more, a ProxyV layer 2F D^2 + 2(P+L)(D^2+2D Dkv).

    Returns:
        FLOPs of a prefill: for an ordinary layer 2S(2D^2+2D Dkv+3DI) + 4S^2 D, for a ProxyV layer
        2F(2D Dkv) + 2F(2D h + 2h^2) + 2P D h + 2(P+L)(2D^2+2D Dkv+3DI) + 4(P+L)(S+P)D, where
        2D h + 2h^2 is 2.5 D h for the paper's h = D/4. Making learned proxies is not counted.
        Without proxies, "atn" costs 2F(D^2+3DI) and "atn_ffn" 2F(2D h) in place of the guided
        update.

    Raises:
        ValueError: a packing whose tokens do not follow from the crops.

    Source: paper section 4. Differs: the paper prints figures only; this formula is the one that
        gives them.
    """
    shape = _Shape.of(config, row)
    layers = config.text_config.num_hidden_layers
    start = layers if config.start_layer is None or not row.crops else config.start_layer
    left = full_tokens(config.reduction_method, shape.full, layers)
    stages = [dataclasses.replace(shape, full=full) for full in left]
    ordinary = sum(_paper_ordinary(stage, fused_qkv) for stage in stages[:start])
    return ordinary + sum(_paper_proxyv(config, stage, fused_qkv) for stage in stages[start:])


def layers_flops(config: Any, rows: Sequence[int]) -> int:
    """FLOPs of ordinary decoder layers as the paper counts them, given the rows in each."""
    shape = _Shape.of(config, RowTokens(crops=0, text=0))
    return sum(_paper_ordinary(dataclasses.replace(shape, light=n), False) for n in rows)


def _paper_ordinary(shape: _Shape, fused_qkv: bool) -> int:
    """An ordinary layer as the paper counts it."""
    flops = shape.natural * shape.linear() + shape.attention(shape.natural**2)
    return flops + (shape.natural * shape.keys(fused=True) if fused_qkv else 0)


def _paper_proxyv(config: Any, shape: _Shape, fused_qkv: bool) -> int:
    """A ProxyV layer, or one that skips, as the paper counts it."""
    main = shape.proxies + shape.light
    inner = shape.full * shape.keys(fused=fused_qkv) + main * shape.linear()
    if config.skip is None:
        inner += 4 * shape.full * shape.hidden * (shape.width + shape.hidden)
        inner += 2 * shape.proxies * shape.width * shape.hidden
    else:
        inner += shape.full * shape.skipping(config.skip)
    inner += shape.attention(main * (shape.natural + shape.proxies))
    return inner + (main * shape.keys(fused=True) if fused_qkv else 0)


def run_flops(
    config: Any,
    row: RowTokens,
    *,
    causal: bool = False,
    folded: bool = False,
    head_rows: int = 1,
) -> dict[str, int]:
    """FLOPs of a forward pass as this code runs it, of one row of the batch, by part.

    Args:
        config: a ``ProxyVConfig``.
        row: what is read.
        causal: ordinary layers without a mask compute the lower half of the scores only, as
            fused kernels do; eager attention computes all. The small attentions of ProxyV
            layers have explicit masks and are counted in full either way, and so are ordinary
            layers of the released layout.
        folded: the guided updates are folded, see ``ProxyVForConditionalGeneration.fuse``.
        head_rows: rows whose logits are computed.

    Returns:
        FLOPs of "vision_tower", "projector", "language_model", "proxyv" (guided updates and
        learned proxies, or the small MLPs of "atn_ffn") and "lm_head".

    Raises:
        ValueError: a packing whose tokens do not follow from the crops.
    """
    shape = _Shape.of(config, row)
    text, start = config.text_config, config.start_layer
    layers = text.num_hidden_layers
    causal = causal and (config.layout == "natural" or not row.crops)
    method, fused = config.reduction_method, text.model_type == "phi3"
    left = full_tokens(method, shape.full, layers)
    stages = [
        dataclasses.replace(shape, full=full, past=past)
        for full, past in zip(left, _cached_rows(config, row), strict=True)
    ]
    start = layers if start is None or not row.crops else start
    widths = (shape.width, shape.query, shape.key)
    decoder = scoring_flops(method, left, shape.light, widths, fused)
    decoder += sum(_ordinary(stage, causal) for stage in stages[:start])
    guided = 0
    for number, stage in enumerate(stages[start:], start):
        inner, last = _proxyv_layers(stage, fused)
        if number == layers - 1:
            decoder += last
            continue
        decoder += inner
        if config.skip is None:
            guided += _guided_update(config, stage, folded, makes=number == start)
        elif config.skip == "atn_ffn":
            guided += stage.full * stage.skipping("atn_ffn")
        else:
            decoder += stage.full * stage.skipping("atn")
    per_crop = shape.full // max(1, row.crops)
    tower = _tower(config) + tower_method_flops(config, method, per_crop)
    projector = _projector(config, shape.full)
    if isinstance(method, ProjectorReduction):
        projector = row.crops * packer_flops(config, method)
    return {
        "vision_tower": row.crops * tower,
        "projector": projector,
        "language_model": decoder,
        "proxyv": guided,
        "lm_head": 2 * head_rows * shape.width * text.vocab_size,
    }


def kv_cache_bytes(config: Any, row: RowTokens, bytes_per_value: int) -> int:
    """Bytes of keys and values in all layers once the row has been read, proxies or not."""
    rows = sum(_cached_rows(config, row.cached()))
    return rows * 2 * config.head_width * config.text_config.num_key_value_heads * bytes_per_value


def _ordinary(shape: _Shape, causal: bool) -> int:
    """An ordinary layer as it runs."""
    pairs = shape.natural * (shape.natural + shape.past)
    if causal:
        pairs = shape.natural * shape.past + shape.natural * (shape.natural + 1) // 2
    return shape.natural * shape.linear() + shape.attention(pairs)


def _proxyv_layers(shape: _Shape, fused: bool) -> tuple[int, int]:
    """A ProxyV layer without its guided update; the last one, which has no proxies."""
    keys = shape.full * shape.keys(fused)
    seen = shape.light * shape.natural + shape.proxies * (shape.proxies + shape.light)
    inner = keys + (shape.light + shape.proxies) * shape.linear() + shape.attention(seen)
    last = keys + shape.light * shape.linear()
    return inner, last + shape.attention(shape.light * shape.natural)


def _guided_update(config: Any, shape: _Shape, folded: bool, makes: bool) -> int:
    """The guided update of one layer, and making learned proxies where it is the first."""
    width, hidden = shape.width, shape.hidden
    merge = 0 if folded else hidden**2
    flops = 2 * shape.full * (2 * width * hidden + merge)
    flops += 2 * shape.proxies * (width * hidden + merge)
    if config.proxy_kind == "learned":
        pairs = shape.full * shape.crop_proxies
        flops += 2 * pairs * hidden
        if makes:
            flops += 2 * shape.full * width * hidden + 2 * pairs * (hidden + width)
    return flops


def _tower(config: Any) -> int:
    """One crop through the vision tower; the patches, and all layers, for all are run."""
    vision = config.vision_config
    method = config.reduction_method
    patches = config.crop_tokens if method is not None and method.stage == "image" else None
    width, tokens = vision.hidden_size, (patches or config.side**2) + 1
    embedding = 2 * (tokens - 1) * 3 * vision.patch_size**2 * width
    layer = 2 * tokens * (4 * width**2 + 2 * width * vision.intermediate_size)
    return embedding + vision.num_hidden_layers * (layer + 4 * tokens**2 * width)


def _projector(config: Any, rows: int) -> int:
    width, chosen = config.text_config.hidden_size, config.vision_feature_layer
    features = config.vision_config.hidden_size * (1 if isinstance(chosen, int) else len(chosen))
    return 2 * rows * (features * width + width**2)
