"""From pixels to the rows that an image takes in the sequence: tower, pool, projector, packing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from proxyv.model.crops import ImageGrid, image_grids, real_crops

__all__ = ["ImageFeaturesMixin"]


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

    def tower_features(
        self,
        crops: Tensor,
        vision_feature_layer: int | Sequence[int] | None = None,
        vision_feature_select_strategy: str | None = None,
    ) -> Tensor:
        """Run crops through the vision tower.

        Args:
            crops: (N, 3, height, width) pixels.
            vision_feature_layer: hidden layer(s) of the tower; default from the configuration.
            vision_feature_select_strategy: "default" drops the class token, "full" keeps it.

        Returns:
            (N, s*s, width of the tower), or that width times the number of layers.

        Raises:
            ValueError: the tower gives another number of tokens than s*s.
        """
        layer = vision_feature_layer
        if layer is None:
            layer = self.config.vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        states = self.vision_tower(crops, output_hidden_states=True).hidden_states
        layers = [layer] if isinstance(layer, int) else list(layer)
        features = torch.cat([states[index] for index in layers], dim=-1)
        if strategy == "default":
            features = features[:, 1:]
        if features.shape[1] != self.config.side**2:
            raise ValueError(
                f"the vision tower gives {features.shape[1]} tokens a crop, expected "
                f"{self.config.side}**2; vision_feature_select_strategy is {strategy!r}"
            )
        return features

    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        num_crops: Tensor | None = None,
        pool_sizes: Tensor | None = None,
        vision_feature_layer: int | Sequence[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
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
            ``num_unpadded_tokens`` says where the packing is "llava_next".
        """
        grids = image_grids(self.config, pixel_values, num_crops, image_sizes, pool_sizes)
        crops = real_crops(pixel_values, grids).to(self.vision_tower.dtype)
        features = self.tower_features(
            crops, vision_feature_layer, vision_feature_select_strategy
        )  # (crops, s*s, width)
        images = self._project(features, grids)
        output = BaseModelOutputWithPooling()
        if self.config.packing == "llava_next":
            strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
            images, _ = self.pack_image_features(images, image_sizes, strategy, self.image_newline)
        else:
            images = [_with_newlines(image, self.image_newline) for image in images]
        output["pooler_output"] = images
        return output

    def _project(self, features: Tensor, grids: Sequence[ImageGrid]) -> list[Tensor]:
        """(crops, s*s, width) to (C, side*side, D) for each image, in one call of the projector."""
        counts, sides = [grid.num_crops for grid in grids], [grid.side for grid in grids]
        if any(side != self.config.side for side in sides):
            pooled = [
                _pool(image, self.config.side // side)
                for image, side in zip(features.split(counts), sides, strict=True)
            ]
            rows = self.multi_modal_projector(torch.cat([image.flatten(0, 1) for image in pooled]))
            images = rows.split([n * side**2 for n, side in zip(counts, sides, strict=True)])
            return [image.unflatten(0, (n, -1)) for n, image in zip(counts, images, strict=True)]
        return list(self.multi_modal_projector(features).split(counts))


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
