"""Encoded images of data sets and files: finding the bytes, looking at the size, decoding."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from proxyv.model.images import to_rgb

__all__ = ["image_bytes", "image_size_hw", "open_image"]

BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def image_bytes(cell: Any, folder: Path | None) -> bytes:
    """The encoded image of a row.

    Args:
        cell: a path, encoded bytes, or ``{"bytes", "path"}`` as ``datasets`` stores images.
        folder: where relative paths start.

    Raises:
        ValueError: the row has no image, or its file cannot be read.
    """
    path = cell.get("path") if isinstance(cell, Mapping) else cell
    content = cell.get("bytes") if isinstance(cell, Mapping) else None
    if isinstance(cell, bytes):
        content = cell
    if content:
        return content
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError("the row has no image")
    file = Path(folder or ".", path)
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"image {file} cannot be read ({error.strerror or error})") from error


def open_image(content: bytes) -> Image.Image:
    """Decode an image as training does: upright, in RGB, transparent parts white.

    Raises:
        ValueError: the bytes are no complete image.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return to_rgb(image)
    except BROKEN as error:
        raise ValueError(f"the image cannot be decoded ({error})") from error


def image_size_hw(content: bytes) -> tuple[int, int]:
    """Height and width of an upright image, from its header alone.

    Raises:
        ValueError: the bytes are no image.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except BROKEN as error:
        raise ValueError(f"the image cannot be decoded ({error})") from error
