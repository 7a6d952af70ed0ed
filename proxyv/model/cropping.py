"""Images and video frames to crops, and crops to counts of tokens.

``pad`` makes one crop: the image on a square of the mean colour. ``anyres`` makes several: the
whole image squashed to one crop, then the tiles of the best of several resolutions, if they are two
or more. Pixels equal those of the authors' ``process_images``, because resizing stays in PIL. A
video is an image whose crops are its frames, each made as by ``pad``, and pooled in the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import SizeDict

from proxyv.cli import require_one_of
from proxyv.model.crops import (
    ASPECT_RATIOS,
    CropLayout,
    crop_layout,
    num_image_tokens,
    num_unpadded_tokens,
    pooled_side,
)
from proxyv.model.images import flatten_images, flatten_videos, stack_crops, to_rgb
from proxyv.model.marks import VIDEO_MARK, find_marks

__all__ = ["CroppingMixin"]


class CroppingMixin:
    """The image side of a processor; put it before the stock class.

    The class it is mixed into has the attributes below, see ``ProxyVProcessor``.
    """

    image_processor: Any
    patch_size: int | None
    image_token: str
    image_aspect_ratio: str
    packing: str
    video_pool: int
    crop_tokens: int | None

    @property
    def crop_px(self) -> int:
        """Side of a crop in pixels."""
        return int(self.image_processor.crop_size["height"])

    @property
    def side(self) -> int:
        """Side of a crop in patches."""
        if self.patch_size is None:
            raise ValueError("patch_size is not set: give the processor the vision tower's")
        return self.crop_px // self.patch_size

    @property
    def rows_per_crop(self) -> int:
        """Rows of the sequence that one crop takes: its full tokens and its newline."""
        return (self.crop_tokens or self.side**2) + 1

    def crop_layout(
        self, size_hw: tuple[int, int], image_aspect_ratio: str | None = None
    ) -> CropLayout:
        """How an image of ``size_hw`` is cut by this processor; see ``crop_layout``."""
        return crop_layout(
            size_hw,
            image_aspect_ratio or self.image_aspect_ratio,
            self.image_processor.image_grid_pinpoints,
            self.crop_px,
        )

    def num_image_tokens(
        self, size_hw: tuple[int, int], image_aspect_ratio: str | None = None
    ) -> int:
        """Image tokens that an image of ``size_hw`` takes in the sequence."""
        return self._num_tokens(size_hw, self.crop_layout(size_hw, image_aspect_ratio))

    def token_counts(self, inputs: Mapping[str, Any]) -> list[int]:
        """Image tokens of each image, from what ``image_inputs`` gave."""
        pools = inputs.get("pool_sizes")
        counts = []
        for image, (height, width) in enumerate(inputs["image_sizes"].tolist()):
            num_crops, pool = int(inputs["num_crops"][image]), 1 if pools is None else pools[image]
            if self.packing == "llava_next" and num_crops > 1:
                counts.append(self.num_image_tokens((height, width), "anyres"))
            elif int(pool) == 1:
                counts.append(num_crops * self.rows_per_crop)
            else:
                counts.append(num_image_tokens(num_crops, pooled_side(self.side, int(pool))))
        return counts

    def _num_tokens(self, size_hw: tuple[int, int], cut: CropLayout) -> int:
        if self.packing == "llava_next":
            return num_unpadded_tokens(size_hw, cut.grid_hw, self.side)
        return cut.num_crops * self.rows_per_crop

    def image_inputs(self, images: Any, image_aspect_ratio: str | None = None) -> dict[str, Any]:
        """Turn images into model inputs.

        Args:
            images: an image or a list of images, as ``to_rgb`` takes them.
            image_aspect_ratio: "pad" or "anyres"; default: the processor's.

        Returns:
            ``pixel_values`` (images, C_max, 3, height, width) float32, padded with zero crops;
            ``num_crops`` (images,); ``image_sizes`` (images, 2) height and width before cutting.
        """
        opened = [to_rgb(image) for image in flatten_images(images)]
        if not opened:
            raise ValueError("images is an empty list: give at least one image, or None")
        return stack_crops([self._cut(image, image_aspect_ratio) for image in opened])

    def media_inputs(
        self,
        texts: Sequence[str],
        images: Any,
        videos: Any,
        image_aspect_ratio: str | None = None,
    ) -> dict[str, Any]:
        """As ``image_inputs``, for images and videos in the order in which the texts name them.

        Args:
            texts: with one ``<image>`` for every image and one ``<video>`` for every video.
            images: images in order of appearance, or None.
            videos: a list of videos in order of appearance, nested or not; each is a list of
                frames or an array (frames, height, width, 3).
            image_aspect_ratio: of the images.

        Returns:
            As ``image_inputs``, and ``pool_sizes`` (images,).
        """
        pictures, clips = [] if images is None else flatten_images(images), flatten_videos(videos)
        pattern = find_marks(self.image_token, VIDEO_MARK)
        marks = [mark for text in texts for mark in pattern.findall(text)]
        kinds = {self.image_token: (pictures, "images"), VIDEO_MARK: (clips, "videos")}
        for mark, (given, what) in kinds.items():
            if marks.count(mark) != len(given):
                raise ValueError(
                    f"the text has {marks.count(mark)} {mark}, but {len(given)} {what} were given"
                )
        supply = {mark: iter(given) for mark, (given, _) in kinds.items()}
        cuts, pools = [], []
        for mark in marks:
            medium: Any = next(supply[mark])
            if mark == VIDEO_MARK:
                frames = [self._cut(to_rgb(frame), "pad") for frame in medium]
                cuts.append((np.concatenate([crop for crop, _ in frames]), frames[0][1]))
            else:
                cuts.append(self._cut(to_rgb(medium), image_aspect_ratio))
            pools.append(self.video_pool if mark == VIDEO_MARK else 1)
        return {**stack_crops(cuts), "pool_sizes": torch.tensor(pools)}

    def _cut(self, image: Image.Image, ratio: str | None) -> tuple[np.ndarray, tuple[int, int]]:
        """Crops (C, 3, height, width) of an image, and its height and width."""
        ratio = ratio or self.image_aspect_ratio
        require_one_of("image_aspect_ratio", ratio, ASPECT_RATIOS)
        cut = self._pad_crop if ratio == "pad" else self._anyres_crops
        return cut(image), (image.height, image.width)

    def _pad_crop(self, image: Image.Image) -> np.ndarray:
        """(1, 3, height, width): the image on a square of the mean colour, as one crop.

        Source: authors' expand2square and process_images.
        """
        processor, longest = self.image_processor, max(image.size)
        colour = tuple(int(255 * mean) for mean in processor.image_mean)
        square = Image.new("RGB", (longest, longest), colour)
        square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
        pixels = processor.resize(
            image=np.asarray(square).transpose(2, 0, 1),
            size=SizeDict(height=self.crop_px, width=self.crop_px),
            resample=processor.resample,
        )
        pixels = processor.rescale(image=pixels, scale=processor.rescale_factor)
        pixels = processor.normalize(
            image=pixels, mean=processor.image_mean, std=processor.image_std
        )
        return np.asarray(pixels, dtype=np.float32)[None]

    def _anyres_crops(self, image: Image.Image) -> np.ndarray:
        """(C, 3, height, width): the thumbnail, then the tiles in raster order."""
        cut = self.crop_layout((image.height, image.width), "anyres")
        pixels = self.image_processor.preprocess([image], do_pad=False)["pixel_values"][0]
        return np.asarray(pixels[: cut.num_crops], dtype=np.float32)
