"""Images and text to model inputs, and the one place that counts crops and image tokens.

``pad`` makes one crop: the image on a square of the mean colour. ``anyres`` makes several: the
whole image squashed to one crop, then the tiles of the best of several resolutions. Pixels equal
those of the authors' ``process_images``, because resizing stays in PIL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, LlavaNextProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.image_utils import SizeDict, load_image
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.processing_utils import MultiModalData

__all__ = [
    "ASPECT_RATIOS",
    "CropLayout",
    "ProxyVProcessor",
    "crop_layout",
    "num_image_tokens",
    "to_rgb",
]

ASPECT_RATIOS = ("pad", "anyres")


@dataclass(frozen=True)
class CropLayout:
    """How one image is cut.

    Attributes:
        num_crops: crops in all, the thumbnail included.
        grid_hw: tiles down and across, without the thumbnail; (0, 0) for "pad".
        canvas_hw: pixels of the canvas that the tiles cover; one crop for "pad".
    """

    num_crops: int
    grid_hw: tuple[int, int]
    canvas_hw: tuple[int, int]


def crop_layout(
    size_hw: tuple[int, int],
    aspect_ratio: str,
    pinpoints_hw: Sequence[Sequence[int]],
    crop_px: int,
) -> CropLayout:
    """Say how an image of a given size is cut; the same for processor, model and FLOPs counts.

    Args:
        size_hw: height and width of the image in pixels.
        aspect_ratio: "pad" or "anyres".
        pinpoints_hw: resolutions that "anyres" chooses from, (height, width) each; the first
            wins a tie.
        crop_px: side of a crop in pixels.

    Returns:
        The cut.

    Raises:
        ValueError: an unknown ``aspect_ratio``, an empty image, no pinpoints, or a pinpoint that
            crops do not tile.

    Source: authors' select_best_resolution and process_anyres_image. Differs: height first.
    """
    _check_aspect_ratio(aspect_ratio)
    height, width = int(size_hw[0]), int(size_hw[1])
    if height < 1 or width < 1:
        raise ValueError(f"image of height {height} and width {width}: both must be at least 1")
    if aspect_ratio == "pad":
        return CropLayout(1, (0, 0), (crop_px, crop_px))
    if not pinpoints_hw:
        raise ValueError("image_grid_pinpoints is empty: give at least one (height, width)")
    best_h, best_w = select_best_resolution((height, width), [tuple(p) for p in pinpoints_hw])
    if best_h % crop_px or best_w % crop_px:
        raise ValueError(
            f"image_grid_pinpoints holds ({best_h}, {best_w}), which crops of {crop_px} pixels do "
            f"not tile: use multiples of {crop_px}"
        )
    grid = (best_h // crop_px, best_w // crop_px)
    return CropLayout(grid[0] * grid[1] + 1, grid, (best_h, best_w))


def num_image_tokens(num_crops: int, side: int) -> int:
    """Tokens that an image takes in the sequence: s*s full tokens and a newline for each crop."""
    return num_crops * (side * side + 1)


def to_rgb(image: Any) -> Image.Image:
    """Open an image (PIL image, array, path or address) upright and in RGB.

    Rotation marks are followed, transparent parts become white, 16 bits are scaled to 8, and an
    animation gives its first frame. A plain RGB image stays as it is.
    """
    if isinstance(image, np.ndarray | torch.Tensor):
        array = np.asarray(image)
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
            array = array.transpose(1, 2, 0)
        image = Image.fromarray(array.squeeze().astype(np.uint8))
    elif not isinstance(image, Image.Image):
        image = load_image(str(image))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits; converting would clip them to white
        deep = np.asarray(image).astype(np.float64)
        image = Image.fromarray(
            (deep / 257 if deep.max(initial=0) > 255 else deep).astype(np.uint8)
        )
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


class ProxyVProcessor(LlavaNextProcessor):
    """Tokenizer and image processor of a ProxyV model.

    Every ``<image>`` in the text becomes C*(s*s+1) image tokens, C from the image's size.

    Args:
        image_processor: a LLaVA-NeXT image processor; its crop size is the vision tower's image
            size and its ``image_grid_pinpoints`` are (height, width). One that resizes with
            torchvision is replaced by the PIL one, whose pixels are the authors'.
        tokenizer: with ``image_token`` as one token.
        patch_size: of the vision tower.
        vision_feature_select_strategy: as in the model's configuration.
        chat_template: template of ``apply_chat_template``.
        image_token: text that stands for an image.
        num_additional_image_tokens: tokens of the tower that are no patches (the class token).
        image_aspect_ratio: "pad" or "anyres"; a call may override it.
        **kwargs: passed on.

    Raises:
        ValueError: an unknown aspect ratio, another image processor, a tokenizer without the
            image token, or crops that patches do not tile.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = "default",
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 1,
        image_aspect_ratio: str = "anyres",
        **kwargs: Any,
    ) -> None:
        _check_aspect_ratio(image_aspect_ratio)
        if not isinstance(image_processor, LlavaNextImageProcessorPil):
            if not type(image_processor).__name__.startswith("LlavaNextImageProcessor"):
                raise ValueError(
                    f"image_processor is a {type(image_processor).__name__}: use "
                    "LlavaNextImageProcessorPil"
                )
            image_processor = LlavaNextImageProcessorPil.from_dict(image_processor.to_dict())
        self.image_aspect_ratio = image_aspect_ratio
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"the tokenizer does not know image_token={self.image_token!r}: add it as a "
                "special token first"
            )
        if patch_size is not None and self.crop_px % patch_size:
            raise ValueError(
                f"patch_size={patch_size} does not divide the crop size of {self.crop_px} pixels"
            )

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
    def model_input_names(self) -> list[str]:
        """Names of everything a call can return."""
        return [*self.tokenizer.model_input_names, "pixel_values", "num_crops", "image_sizes"]

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
        return num_image_tokens(self.crop_layout(size_hw, image_aspect_ratio).num_crops, self.side)

    def image_inputs(self, images: Any, image_aspect_ratio: str | None = None) -> dict[str, Any]:
        """Turn images into model inputs.

        Args:
            images: an image or a list of images, as ``to_rgb`` takes them.
            image_aspect_ratio: "pad" or "anyres"; default: the processor's.

        Returns:
            ``pixel_values`` (images, C_max, 3, height, width) float32, padded with zero crops;
            ``num_crops`` (images,); ``image_sizes`` (images, 2) height and width before cutting.
        """
        ratio = image_aspect_ratio or self.image_aspect_ratio
        _check_aspect_ratio(ratio)
        opened = [to_rgb(image) for image in _flatten(images)]
        if not opened:
            raise ValueError("images is an empty list: give at least one image, or None")
        cut = self._pad_crop if ratio == "pad" else self._anyres_crops
        crops = [torch.from_numpy(cut(image)) for image in opened]
        most = max(len(image_crops) for image_crops in crops)
        pixel_values = torch.zeros(len(crops), most, *crops[0].shape[1:])
        for target, image_crops in zip(pixel_values, crops, strict=True):
            target[: len(image_crops)] = image_crops
        return {
            "pixel_values": pixel_values,
            "num_crops": torch.tensor([len(image_crops) for image_crops in crops]),
            "image_sizes": torch.tensor([(image.height, image.width) for image in opened]),
        }

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
        self.crop_layout((image.height, image.width), "anyres")  # checks the pinpoints
        pixels = self.image_processor.preprocess([image], do_pad=False)["pixel_values"][0]
        return np.asarray(pixels, dtype=np.float32)

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        image_aspect_ratio: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Turn texts and their images into model inputs.

        Args:
            images: images in order of appearance, over all texts; nested lists are flattened.
            text: a text or a list of texts, each with one ``<image>`` per image.
            image_aspect_ratio: "pad" or "anyres"; default: the processor's.
            **kwargs: for the tokenizer (``return_tensors``, ``padding``, ...).

        Returns:
            ``input_ids``, ``attention_mask`` and, with images, what ``image_inputs`` gives.

        Raises:
            ValueError: as many ``<image>`` as images is not what was given, or truncation would
                cut an image.
        """
        for name in ("videos", "audio"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} were given, but this model reads images and text only")
        options = {**kwargs.pop("common_kwargs", {}), **kwargs.pop("text_kwargs", {}), **kwargs}
        for name in ("images_kwargs", "videos_kwargs", "audio_kwargs"):
            options.pop(name, None)
        return_tensors = options.pop("return_tensors", None)
        pixels = None if images is None else self.image_inputs(images, image_aspect_ratio)
        if text is None:
            if pixels is None:
                raise ValueError("give text, images or both")
            return BatchFeature(pixels)
        texts = [text] if isinstance(text, str) else list(text)
        counts = [] if pixels is None else pixels["num_crops"].tolist()
        expanded, expected = self._expand(texts, counts)
        encoded = self.tokenizer(expanded, return_tensors=return_tensors, **options)
        for row, (ids, tokens) in enumerate(zip(encoded["input_ids"], expected, strict=True)):
            found = int((torch.as_tensor(ids) == self.image_token_id).sum())
            if found != tokens:
                raise ValueError(
                    f"text {row} has {found} image tokens after tokenizing, expected {tokens}: "
                    "truncation must not cut an image, so raise max_length or shorten the text"
                )
        if pixels is not None and return_tensors != "pt":
            pixels = {name: values.numpy() for name, values in pixels.items()}
        return BatchFeature({**encoded, **(pixels or {})})

    def _expand(
        self, texts: Sequence[str], num_crops: Sequence[int]
    ) -> tuple[list[str], list[int]]:
        """Repeat every image token as often as its image needs; also how many that makes."""
        given = sum(text.count(self.image_token) for text in texts)
        if given != len(num_crops):
            raise ValueError(
                f"the text has {given} {self.image_token}, but {len(num_crops)} images were given"
            )
        remaining = iter(num_crops)
        expanded, expected = [], []
        for text in texts:
            parts = text.split(self.image_token)
            counts = [num_image_tokens(next(remaining), self.side) for _ in parts[1:]]
            pieces = [
                self.image_token * n + part for n, part in zip(counts, parts[1:], strict=True)
            ]
            expanded.append(parts[0] + "".join(pieces))
            expected.append(sum(counts))
        return expanded, expected

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Image tokens of images of the given (height, width), for serving engines."""
        if image_sizes is None:
            return MultiModalData()
        counts = [self.num_image_tokens((height, width)) for height, width in image_sizes]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The text that stands for one image, from what ``image_inputs`` gave."""
        count = int(image_inputs["num_crops"][image_idx])
        return self.image_token * num_image_tokens(count, self.side)


def _check_aspect_ratio(value: str) -> None:
    if value not in ASPECT_RATIOS:
        raise ValueError(
            f"image_aspect_ratio={value!r} is not known: use one of {', '.join(ASPECT_RATIOS)}"
        )


def _flatten(images: Any) -> list[Any]:
    """A flat list of images from one image or nested lists of images."""
    if not isinstance(images, list | tuple):
        return [images]
    return [image for entry in images for image in _flatten(entry)]
