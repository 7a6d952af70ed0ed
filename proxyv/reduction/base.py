"""What every token-reduction method is to the model: where it acts, and one call there.

A method is a small frozen object of options. The model asks it for its ``stage`` and then for the
one thing that stage needs, so no caller ever names a method.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from proxyv.reduction.rows import Rows

__all__ = [
    "CLASS_TOKEN",
    "MERGED",
    "STAGES",
    "CropTokens",
    "DecoderReduction",
    "Drop",
    "ImageReduction",
    "ProjectorReduction",
    "Reduction",
    "TowerReduction",
    "TowerStates",
    "require_int",
    "require_number",
]

STAGES = ("image", "tower", "projector", "decoder")
CLASS_TOKEN = -1  # values of CropTokens.origin for tokens that are no patch
MERGED = -2


class Reduction(ABC):
    """A method with its options; a dataclass, so that options can be listed and saved.

    Attributes:
        name: as a configuration writes it.
        stage: "image", "tower", "projector" or "decoder".
        keeps_grid: a reduced crop is a square grid again, of which spatial proxies can be made.
        weights: it has weights of its own.
    """

    name: ClassVar[str]
    stage: ClassVar[str]
    keeps_grid: ClassVar[bool] = False
    weights: ClassVar[bool] = False

    @abstractmethod
    def tokens_per_crop(self, num_patches: int) -> int | None:
        """Tokens that enter the decoder for a crop that has ``num_patches`` at full size.

        Returns:
            The number, or None where it depends on the image.

        Raises:
            ValueError: the options do not fit crops of that size.
        """

    def options(self) -> dict[str, Any]:
        """The method's name and options, as ``build_reduction`` takes them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"method": self.name, **values}


class ImageReduction(Reduction):
    """Acts on pixels: the tower sees smaller crops."""

    stage = "image"

    @abstractmethod
    def shrink(self, pixels: Tensor, patch_px: int) -> Tensor:
        """(N, 3, height, width) -> (N, 3, smaller height, smaller width), whole patches."""


@dataclass(frozen=True)
class TowerStates:
    """What a run of the vision tower leaves for a method, N crops of n patches.

    Attributes:
        features: (N, c+n, W) hidden state that the projector would get; c = 1 with a class token,
            which comes first.
        has_class: whether there is a class token.
        query: (N, H, R, h) queries of the attention layer that the method names: of the class
            token (R = 1), or of every token where there is none; None if it names no layer.
        key: (N, H, c+n, h) keys of that layer, or None.
    """

    features: Tensor
    has_class: bool
    query: Tensor | None = None
    key: Tensor | None = None

    @property
    def patches(self) -> Tensor:
        """(N, n, W) the features without the class token."""
        return self.features[:, 1:] if self.has_class else self.features


@dataclass(frozen=True)
class CropTokens:
    """The tokens that are left of N crops, padded on the right to the longest crop.

    Attributes:
        tokens: (N, n', W), zeros where padding.
        valid: (N, n') False where padding.
        origin: (N, n') patch in raster order that a token stands for, ``CLASS_TOKEN``, or
            ``MERGED`` for a token made of several; for drawing what was kept.
    """

    tokens: Tensor
    valid: Tensor
    origin: Tensor


class TowerReduction(Reduction):
    """Acts on the tower's output, crop by crop, without knowing the text.

    Attributes:
        attention_layer: whose queries and keys ``TowerStates`` shall hold: "producing" is the
            layer whose output the features are, "last" the tower's last layer, None neither.
    """

    stage = "tower"
    attention_layer: ClassVar[str | None] = None

    @abstractmethod
    def reduce(self, states: TowerStates) -> CropTokens:
        """Reduce every crop; no crop's result depends on another."""


class ProjectorReduction(Reduction):
    """Replaces the projector by one with fewer outputs than inputs, which has to be trained."""

    stage = "projector"
    weights = True

    @abstractmethod
    def build(self, vision_width: int, hidden_size: int, side: int, levels: int) -> nn.Module:
        """The projector (N, side*side, levels*W) -> (N, n', D); it has ``init_weights``.

        Args:
            vision_width: width W of one tower layer.
            hidden_size: width D of the language model.
            side: crop side in patches.
            levels: tower layers that ``vision_feature_layer`` names.
        """


@dataclass(frozen=True)
class Drop:
    """One drop inside the decoder.

    Attributes:
        scoring: layer whose queries and keys, computed from what enters it, give the scores.
        before: first layer that runs on the rows that are left; ``scoring`` or the one after.
    """

    scoring: int
    before: int


class DecoderReduction(Reduction):
    """Drops image rows between decoder layers while a prompt is read, never while decoding.

    Attributes:
        renumber: rows that are left get consecutive rotary positions; else they keep theirs.
        all_queries: ``scores`` wants the queries of all rows, not of the judging ones only.
    """

    stage = "decoder"
    renumber: ClassVar[bool] = False
    all_queries: ClassVar[bool] = False

    def tokens_per_crop(self, num_patches: int) -> int:
        """All of them: rows are dropped later."""
        return num_patches

    @abstractmethod
    def drops(self, num_layers: int) -> tuple[Drop, ...]:
        """The drops in order, checked against the depth of the decoder."""

    @abstractmethod
    def keep_counts(self, number: int, rows: Rows) -> Tensor:
        """(B,) image rows that are left after drop ``number``, counted from 0."""

    @abstractmethod
    def scores(self, query: Tensor, key: Tensor, rows: Rows, scaling: float) -> Tensor:
        """Score the rows; those with the highest scores stay.

        Args:
            query: (B, H, R, h) of ``rows.queries``, or of all rows; after rotary positions.
            key: (B, K, S, h) likewise; K divides H.
            rows: what the S rows are.
            scaling: factor of the layer's attention scores.

        Returns:
            (B, S) float32; only image rows are read.
        """


def require_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Check an integer option.

    Raises:
        ValueError: not an integer, or outside low..high (no upper end where None).
    """
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not fits or (high is not None and value > high):
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be an integer {allowed}, got {value!r}")


def require_number(name: str, value: Any, low: float, high: float) -> None:
    """Check a numeric option.

    Raises:
        ValueError: not a number, or outside low..high.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low} to {high}, got {value!r}")
