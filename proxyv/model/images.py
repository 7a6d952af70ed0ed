"""Opening images of every kind, and flat lists of images and videos from nested ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_utils import load_image

__all__ = ["flatten_images", "flatten_videos", "stack_crops", "to_rgb"]


def to_rgb(image: Any) -> Image.Image:
    """Open an image upright and in RGB.

    Rotation marks are followed, transparent parts become white, 16 bits are scaled to 8, and an
    animation gives its first frame. A plain RGB image stays as it is.

    Args:
        image: a PIL image, a path, an address (http or base64), or an array or tensor (height,
            width[, channels]) or (channels, height, width) of bytes, 16-bit integers, or floating
            point numbers from 0 to 1.

    Raises:
        ValueError: an array of another shape or range.
        OSError: a file that is not there or holds no image.
    """
    if isinstance(image, np.ndarray | torch.Tensor):
        image = _from_array(np.asarray(image))
    elif not isinstance(image, Image.Image):
        local = isinstance(image, Path) or Path(str(image)[:4096]).is_file()
        image = Image.open(image) if local else load_image(str(image))
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):  # converting would clip it to white
        deep = np.asarray(image).astype(np.float64)
        scale = 257 if image.mode != "I" or deep.max(initial=0) > 255 else 1
        image = Image.fromarray((deep / scale).clip(0, 255).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    """A PIL image of an array, channels first or last."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ValueError(
            f"an image has shape {array.shape}: expected (height, width), (height, width, "
            "channels) or (channels, height, width) with 1, 3 or 4 channels"
        )
    if array.dtype == np.uint16:
        array = (array / 257).round()
    elif array.dtype.kind == "f":
        array = array * 255.0
    if array.dtype == bool:
        array = array * np.uint8(255)
    if not (0 <= array.min(initial=0) and array.max(initial=0) <= 255):
        raise ValueError(
            f"an image of type {array.dtype} holds {array.min()} to {array.max()}: expected bytes "
            "from 0 to 255, 16-bit integers, or floating point numbers from 0 to 1"
        )
    return Image.fromarray(array.round().astype(np.uint8))


def stack_crops(cuts: Sequence[tuple[np.ndarray, tuple[int, int]]]) -> dict[str, Any]:
    """Stack the crops of several images, padded with zero crops."""
    most = max(len(crops) for crops, _ in cuts)
    pixel_values = torch.zeros(len(cuts), most, *cuts[0][0].shape[1:])
    for target, (crops, _) in zip(pixel_values, cuts, strict=True):
        target[: len(crops)] = torch.from_numpy(crops)
    return {
        "pixel_values": pixel_values,
        "num_crops": torch.tensor([len(crops) for crops, _ in cuts]),
        "image_sizes": torch.tensor([size for _, size in cuts]),
    }


def flatten_images(images: Any) -> list[Any]:
    """A flat list of images from one image or nested lists of images."""
    if not isinstance(images, list | tuple):
        return [images]
    return [image for entry in images for image in flatten_images(entry)]


def flatten_videos(videos: Any) -> list[Sequence[Any]]:
    """A flat list of videos from nested lists of them.

    Raises:
        ValueError: something that is no video, or an array of no frames. An empty list is no video
            that lacks its frames, but a text's list of none.
    """
    if getattr(videos, "ndim", 0) == 4:
        if not len(videos):
            raise ValueError(
                f"a video is an array {tuple(videos.shape)} of 0 frames: give at least one frame"
            )
        return [videos]
    if not isinstance(videos, list | tuple):
        raise ValueError(
            f"a video is a {type(videos).__name__}: give a list of frames, or an array (frames, "
            "height, width, 3)"
        )
    is_frame = [not isinstance(e, list | tuple) and getattr(e, "ndim", 0) < 4 for e in videos]
    if videos and all(is_frame):
        return [videos]
    return [video for entry in videos for video in flatten_videos(entry)]
