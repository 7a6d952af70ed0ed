"""Images, video frames and text to model inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.processing_utils import MultiModalData

from proxyv.cli import require_one_of
from proxyv.config import PACKINGS
from proxyv.model.cropping import CroppingMixin
from proxyv.model.crops import ASPECT_RATIOS
from proxyv.model.marks import VIDEO_MARK, as_texts, begin_anew, expand_marks, find_marks
from proxyv.model.released import is_release, release_parts

__all__ = ["ProxyVProcessor"]


class ProxyVProcessor(CroppingMixin, LlavaNextProcessor):  # type: ignore[misc]
    """Tokenizer and image processor of a ProxyV model.

    Every ``<image>`` in the text becomes C*(s*s+1) image tokens, C from the image's size; every
    ``<video>``, where videos are given, C*((s/p)^2+1) of the same tokens for C frames.

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
        require_one_of("image_aspect_ratio", image_aspect_ratio, ASPECT_RATIOS)
        require_one_of("packing", packing, PACKINGS)
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

    def follow(self, config: Any) -> None:
        """Reserve as many tokens for a crop as a model with this ``ProxyVConfig`` expects."""
        tokens = config.crop_tokens
        self.crop_tokens = None if tokens == self.side**2 else tokens

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything a call can return."""
        images = ["pixel_values", "num_crops", "image_sizes", "pool_sizes"]
        return [*self.tokenizer.model_input_names, *images]

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
        texts = as_texts(text)
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
        marks = find_marks(self.image_token, *([] if videos is None else [VIDEO_MARK]))
        if self.packing == "crops":
            texts = [begin_anew(part, marks, self.tokenizer, self.image_token) for part in texts]
        expanded, expected = expand_marks(texts, counts, marks, self.image_token)
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


def _holds_release(name: Any, options: Mapping[str, Any]) -> bool:
    """Whether there is a release; a folder of a processor alone has no ``config.json``."""
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        return False
    return is_release(name, **options)
