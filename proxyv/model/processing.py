"""Images, video frames and text to model inputs.

``pad`` makes one crop: the image on a square of the mean colour. ``anyres`` makes several: the
whole image squashed to one crop, then the tiles of the best of several resolutions. Pixels equal
those of the authors' ``process_images``, because resizing stays in PIL. A video is an image whose
crops are its frames, each made as by ``pad``, and pooled in the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, LlavaNextProcessor
from transformers.image_utils import SizeDict
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.processing_utils import MultiModalData

from proxyv.config import PACKINGS
from proxyv.model.crops import (
    ASPECT_RATIOS,
    CropLayout,
    crop_layout,
    num_image_tokens,
    num_unpadded_tokens,
    pooled_side,
)
from proxyv.model.images import flatten_images, flatten_videos, stack_crops, to_rgb
from proxyv.model.released import is_release, release_parts

__all__ = [
    "ASPECT_RATIOS",
    "CropLayout",
    "ProxyVProcessor",
    "crop_layout",
    "num_image_tokens",
    "to_rgb",
]

VIDEO_MARK = "<video>"
"""What stands for a video in a text; unlike the image token it never reaches the tokenizer."""


class ProxyVProcessor(LlavaNextProcessor):
    """Tokenizer and image processor of a ProxyV model.

    Every ``<image>`` in the text becomes C*(s*s+1) image tokens, C from the image's size; every
    ``<video>``, where videos are given, F*((s/p)^2+1) of the same tokens for F frames.

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
        packing: how an image becomes tokens, as in the model's configuration.
        video_pool: patches p a side of a video frame that the model averages to one token.
        crop_tokens: full tokens of a crop, where token reduction leaves fewer than s*s of them
            before the decoder; ``follow`` sets it as a model's configuration wants it.
        **kwargs: passed on.

    Raises:
        ValueError: an unknown aspect ratio or packing, another image processor, a tokenizer
            without the image token, or crops that patches do not tile.
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
        packing: str = "crops",
        video_pool: int = 2,
        crop_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        _one_of("image_aspect_ratio", image_aspect_ratio, ASPECT_RATIOS)
        _one_of("packing", packing, PACKINGS)
        if not isinstance(image_processor, LlavaNextImageProcessorPil):
            if not type(image_processor).__name__.startswith("LlavaNextImageProcessor"):
                raise ValueError(
                    f"image_processor is a {type(image_processor).__name__}: use "
                    "LlavaNextImageProcessorPil"
                )
            image_processor = LlavaNextImageProcessorPil.from_dict(image_processor.to_dict())
        self.image_aspect_ratio = image_aspect_ratio
        self.packing = packing
        self.video_pool = video_pool
        self.crop_tokens = crop_tokens
        if chat_template is None:
            chat_template = getattr(tokenizer, "chat_template", None)
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

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> ProxyVProcessor:
        """Load a processor as every transformers processor is loaded.

        That of an authors' release, which has none, is made from its configuration.
        """
        name = pretrained_model_name_or_path
        if cls is ProxyVProcessor and _holds_release(name, kwargs):
            return cls(**release_parts(name, **kwargs))
        return super().from_pretrained(name, *args, **kwargs)

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
    def tokens_per_crop(self) -> int:
        """Rows of the sequence that one crop takes: its full tokens and its newline."""
        return (self.crop_tokens or self.side**2) + 1

    def follow(self, config: Any) -> None:
        """Reserve as many tokens for a crop as a model with this ``ProxyVConfig`` expects."""
        tokens = config.crop_tokens
        self.crop_tokens = None if tokens == self.side**2 else tokens

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything a call can return."""
        images = ["pixel_values", "num_crops", "image_sizes", "pool_sizes"]
        return [*self.tokenizer.model_input_names, *images]

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
                counts.append(num_crops * self.tokens_per_crop)
            else:
                counts.append(num_image_tokens(num_crops, pooled_side(self.side, int(pool))))
        return counts

    def _num_tokens(self, size_hw: tuple[int, int], cut: CropLayout) -> int:
        if self.packing == "llava_next":
            return num_unpadded_tokens(size_hw, cut.grid_hw, self.side)
        return cut.num_crops * self.tokens_per_crop

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
        marks = [mark for text in texts for mark in self._marks().findall(text)]
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
        _one_of("image_aspect_ratio", ratio, ASPECT_RATIOS)
        cut = self._pad_crop if ratio == "pad" else self._anyres_crops
        return cut(image), (image.height, image.width)

    def _marks(self) -> re.Pattern[str]:
        """Matches what stands for an image or a video."""
        return re.compile(f"{re.escape(self.image_token)}|{re.escape(VIDEO_MARK)}")

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
        videos: Any = None,
        image_aspect_ratio: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Turn texts and their images into model inputs.

        Args:
            images: images in order of appearance, over all texts; nested lists are flattened.
            text: a text or a list of texts, each with one ``<image>`` per image, and one
                ``<video>`` per video where videos are given.
            videos: as ``media_inputs`` takes them, over all texts.
            image_aspect_ratio: "pad" or "anyres"; default: the processor's.
            **kwargs: for the tokenizer (``return_tensors``, ``padding``, ...).

        Returns:
            ``input_ids``, ``attention_mask`` and, with images, what ``image_inputs`` gives; with
            videos, what ``media_inputs`` gives.

        Raises:
            ValueError: as many ``<image>`` as images is not what was given, or truncation would
                cut an image.
        """
        if kwargs.pop("audio", None) is not None:
            raise ValueError("audio was given, but this model reads images, videos and text only")
        options = {**kwargs.pop("common_kwargs", {}), **kwargs.pop("text_kwargs", {}), **kwargs}
        image_options = options.pop("images_kwargs", {})
        ratio = image_aspect_ratio or image_options.get("image_aspect_ratio")
        for name in ("videos_kwargs", "audio_kwargs"):
            options.pop(name, None)
        return_tensors = options.pop("return_tensors", None)
        texts = _texts(text)
        pixels: dict[str, Any] = {}
        if videos is not None:
            pixels = self.media_inputs(texts, images, videos, ratio)
        elif images is not None:
            pixels = self.image_inputs(images, ratio)
        if text is None:
            if not pixels:
                raise ValueError("give text, images or both")
            return BatchFeature(pixels)
        counts = self.token_counts(pixels) if pixels else []
        expanded, expected = self._expand(texts, counts, self._marks() if videos else None)
        encoded = self.tokenizer(expanded, return_tensors=return_tensors, **options)
        for row, (ids, tokens) in enumerate(zip(encoded["input_ids"], expected, strict=True)):
            found = int((torch.as_tensor(ids) == self.image_token_id).sum())
            if found != tokens:
                raise ValueError(
                    f"text {row} has {found} image tokens after tokenizing, expected {tokens}: "
                    "truncation must not cut an image, so raise max_length or shorten the text"
                )
        if return_tensors != "pt":
            pixels = {name: values.numpy() for name, values in pixels.items()}
        return BatchFeature({**encoded, **pixels})

    def _expand(
        self, texts: Sequence[str], counts: Sequence[int], marks: re.Pattern[str] | None
    ) -> tuple[list[str], list[int]]:
        """Put image tokens where the texts have marks; also how many that makes in each text."""
        marks = marks or re.compile(re.escape(self.image_token))
        given = sum(len(marks.findall(text)) for text in texts)
        if given != len(counts):
            raise ValueError(
                f"the text has {given} {self.image_token}, but {len(counts)} images were given"
            )
        supply: Iterator[int] = iter(counts)
        texts = [self._begin_anew(text, marks) for text in texts]
        expanded = [marks.sub(lambda _: self.image_token * next(supply), text) for text in texts]
        return expanded, [text.count(self.image_token) for text in expanded]

    def _begin_anew(self, text: str, marks: re.Pattern[str]) -> str:
        """Let text behind an image begin as a text does, as it did in training.

        Sentencepiece vocabularies put a space before a text; a tokenizer that meets text behind a
        token does not, but LLaVA models are trained on pieces tokenized one by one.
        """
        begins = self.tokenizer.tokenize("a")[:1]
        if self.packing != "crops" or not begins or not begins[0].startswith("▁"):
            return text
        tokens = (self.image_token, VIDEO_MARK, *self.tokenizer.get_added_vocab())
        first, *rest = marks.split(text)
        found = marks.findall(text)
        rest = [part if not part or part.startswith(tokens) else " " + part for part in rest]
        return first + "".join(mark + part for mark, part in zip(found, rest, strict=True))

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
        return self.image_token * self.token_counts(image_inputs)[image_idx]


def _texts(text: Any) -> list[str]:
    """One text or several, as a list."""
    texts = [text] if isinstance(text, str) else text if isinstance(text, list | tuple) else None
    if text is not None and (texts is None or not all(isinstance(t, str) for t in texts)):
        raise ValueError(
            f"text is a {type(text).__name__}: give a string or a list of strings; images come "
            "first, so name the arguments, as in processor(images=..., text=...)"
        )
    return list(texts or [])


def _one_of(option: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{option}={value!r} is not known: use one of {', '.join(allowed)}")


def _holds_release(name: Any, options: Mapping[str, Any]) -> bool:
    """Whether there is a release; a folder of a processor alone has no ``config.json``."""
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        return False
    return is_release(name, **options)
