"""From pixels to the rows that an image takes in the sequence: tower, pool, projector, packing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

from proxyv.model.crops import ImageGrid, image_grids, real_crops
from proxyv.reduction.base import ImageReduction, ProjectorReduction, Reduction, TowerReduction
from proxyv.reduction.tower import tower_states

__all__ = [
    "FEATURE_OPTIONS",
    "IMAGE_INPUTS",
    "ImageFeatures",
    "ImageFeaturesMixin",
    "build_projector",
]

IMAGE_INPUTS = ("pixel_values", "num_crops", "image_sizes", "pool_sizes")
"""Inputs of a model with one entry for each image."""
FEATURE_OPTIONS = (*IMAGE_INPUTS[1:], "vision_feature_layer", "vision_feature_select_strategy")
"""What ``get_image_features`` takes beside the pixels."""


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):
    """Features of images as they enter the sequence.

    Attributes:
        grids: what each image became. Where a method lets the image decide how many tokens a
            crop has, ``crop_tokens`` says it, and rows behind a crop's last token are zero.
    """

    grids: list[ImageGrid] | None = None


def build_projector(config: Any) -> nn.Module:
    """The projector that a ``ProxyVConfig`` asks for: the stock one, or that of a method."""
    method = config.reduction_method
    if not isinstance(method, ProjectorReduction):
        return LlavaNextMultiModalProjector(config)
    layers = config.vision_feature_layer
    return method.build(
        config.vision_config.hidden_size,
        config.text_config.hidden_size,
        config.side,
        1 if isinstance(layers, int) else len(layers),
    )


class ImageFeaturesMixin:
    """Features of images; put it before the stock class.

    The class it is mixed into has ``vision_tower``, ``multi_modal_projector``, ``image_newline``
    and a ``ProxyVConfig``.

    Source: authors' encode_images and prepare_inputs_labels_for_multimodal; transformers'
    LlavaNextVideoPooler for frames. Differs: pictures and frames may share a batch.
    """

    config: Any
    vision_tower: Any
    multi_modal_projector: nn.Module
    image_newline: nn.Parameter
    pack_image_features: Any
    reduction: Reduction | None

    def tower_features(
        self,
        crops: Tensor,
        vision_feature_layer: int | Sequence[int] | None = None,
        vision_feature_select_strategy: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run crops through the vision tower, and through a method that reduces them there.

        Args:
            crops: (N, 3, height, width) pixels.
            vision_feature_layer: hidden layer(s) of the tower; default from the configuration.
            vision_feature_select_strategy: "default" drops the class token, "full" keeps it.

        Returns:
            (N, n, width of the tower), or that width times the number of layers: n = s*s, or what
            the method leaves, padded with zeros. And (N, n) False at such padding, None if none.

        Raises:
            ValueError: the tower gives another number of tokens than expected.
        """
        layer = vision_feature_layer
        if layer is None:
            layer = self.config.vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        side, options, method = self.config.side, {}, self.reduction
        if isinstance(method, ImageReduction):
            crops = method.shrink(crops, self.config.vision_config.patch_size)
            side, options = self.config.crop_side, {"interpolate_pos_encoding": True}
        run = self.vision_tower(crops, output_hidden_states=True, **options)
        states = run.hidden_states
        if isinstance(method, TowerReduction):
            found = tower_states(self.vision_tower, states, method, layer, strategy == "default")
            _check_patches(found.patches, side, strategy)
            reduced = method.reduce(found)
            return reduced.tokens, reduced.valid if self.config.image_decides else None
        layers = [layer] if isinstance(layer, int) else list(layer)
        features = torch.cat([states[index] for index in layers], dim=-1)
        if strategy == "default":
            features = features[:, 1:]
        _check_patches(features, side, strategy)
        return features, None

    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        num_crops: Tensor | None = None,
        pool_sizes: Tensor | None = None,
        vision_feature_layer: int | Sequence[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> ImageFeatures:
        """Features of whole images, packed as they enter the sequence.

        Args:
            pixel_values: (images, C_max, 3, height, width), or 4-D with one crop an image.
            image_sizes: (images, 2) height and width; needed by packing "llava_next" only.
            num_crops: (images,) crops of each image; the rest of C_max is padding. Default: all,
                or what ``image_sizes`` say where the packing is "llava_next".
            pool_sizes: (images,) patches a side that are averaged to one token, before the
                projector. Default: 1.
            vision_feature_layer: see ``tower_features``.
            vision_feature_select_strategy: see ``tower_features``.
            **kwargs: not used.

        Returns:
            ``pooler_output`` is a list with (tokens, D) for each image: C*(s*s+1) tokens, or what
            ``num_unpadded_tokens`` says where the packing is "llava_next", or a method leaves;
            ``grids`` tells more.
        """
        grids = image_grids(self.config, pixel_values, num_crops, image_sizes, pool_sizes)
        crops = real_crops(pixel_values, grids).to(self.vision_tower.dtype)
        features, valid = self.tower_features(
            crops, vision_feature_layer, vision_feature_select_strategy
        )
        images = self._project(features, grids)
        if valid is not None:
            images, grids = _reserve_rows(images, valid, grids)
        output = ImageFeatures(grids=grids)
        if self.config.packing == "llava_next":
            strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
            images, _ = self.pack_image_features(images, image_sizes, strategy, self.image_newline)
        else:
            images = [_with_newlines(image, self.image_newline) for image in images]
        output["pooler_output"] = images
        return output

    def _project(self, features: Tensor, grids: Sequence[ImageGrid]) -> list[Tensor]:
        """(crops, n, width) to (C, n', D) for each image, in one call of the projector."""
        counts = [grid.num_crops for grid in grids]
        if all(grid.pool_size == 1 for grid in grids):
            return list(self.multi_modal_projector(features).split(counts))
        pooled = [
            _pool(image, grid.pool_size)
            for image, grid in zip(features.split(counts), grids, strict=True)
        ]
        rows = self.multi_modal_projector(torch.cat([image.flatten(0, 1) for image in pooled]))
        images = rows.split([image.shape[0] * image.shape[1] for image in pooled])
        return [image.unflatten(0, (n, -1)) for n, image in zip(counts, images, strict=True)]


def _check_patches(features: Tensor, side: int, strategy: str) -> None:
    """Refuse features (N, n, W) that are not those of side x side patches."""
    if features.shape[1] != side**2:
        raise ValueError(
            f"the vision tower gives {features.shape[1]} tokens a crop, expected {side}**2; "
            f"vision_feature_select_strategy is {strategy!r}: use 'default' for a tower with a "
            "class token, 'full' for one without"
        )


def _reserve_rows(
    images: list[Tensor], valid: Tensor, grids: Sequence[ImageGrid]
) -> tuple[list[Tensor], list[ImageGrid]]:
    """Give each crop the rows that the sequence holds for it; what has no token is zero.

    Args:
        images: (C, n, D) of each image.
        valid: (crops, n) False where there is no token.
        grids: of the images.

    Returns:
        (C, rows of a crop without its newline, D) of each image, and grids that know how many
        tokens each crop has.

    Raises:
        ValueError: more tokens than there are rows.
    """
    counts = valid.sum(dim=1).tolist()
    reserved, known, crop = [], [], 0
    for image, grid in zip(images, grids, strict=True):
        own = slice(crop, crop + grid.num_crops)
        crop += grid.num_crops
        image = image * valid[own, :, None].to(image)
        spare = grid.rows_per_crop - 1 - valid.shape[1]
        if spare < 0:
            raise ValueError(
                f"a reduction method left {valid.shape[1]} tokens of a crop, for which "
                f"{grid.rows_per_crop - 1} rows are reserved: it may not leave more than the "
                "crop has patches"
            )
        reserved.append(nn.functional.pad(image, (0, 0, 0, spare)))
        known.append(dataclasses.replace(grid, crop_tokens=tuple(counts[own])))
    return reserved, known


def _pool(crops: Tensor, size: int) -> Tensor:
    """Average blocks of ``size`` x ``size`` patches: (C, s*s, width) -> (C, (s/size)^2, width)."""
    C, N, width = crops.shape
    side = round(N**0.5)
    blocks = crops.view(C, side // size, size, side // size, size, width)
    return blocks.mean(dim=(2, 4)).flatten(1, 2)


def _with_newlines(image: Tensor, newline: Tensor) -> Tensor:
    """(C, s*s, D) -> (C*(s*s+1), D), a newline after each crop."""
    newlines = newline.to(image).expand(image.shape[0], 1, -1)
    return torch.cat([image, newlines], dim=1).flatten(0, 1)
