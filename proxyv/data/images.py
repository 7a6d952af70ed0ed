"""Images of a data set: kept inside their folder, limited in size, decoded when asked for."""

from __future__ import annotations

import io
import math
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from proxyv.model.images import to_rgb

__all__ = ["FAULTS", "DataError", "ImageFolder", "ImageRef", "image_of_bytes"]

Read = TypeVar("Read")
_ORIENTATION = 0x0112  # of Exif
_TURNED = (5, 6, 7, 8)  # orientations that swap height and width; anything else is no orientation


FAULTS = (
    "unreadable row",
    "wrong number of images",
    "missing image",
    "corrupt image",
    "image outside its folder",
    "image too large",
    "too long",
)
"""Why a row cannot be used."""


class DataError(ValueError):
    """A row that cannot be used; the message says where it is and what is wrong with it.

    PyTorch raises an error of a worker process anew with the worker's traceback as its text; of
    that text only the message is kept.

    Attributes:
        kind: one of :data:`FAULTS`.
    """

    def __init__(self, message: str = "", kind: str = "unreadable row") -> None:
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())
        self.kind = kind


_CORRUPT = (OSError, EOFError, SyntaxError, ValueError, struct.error, RuntimeError)
"""What PIL raises for a file that is damaged (of AVIF and DDS: RuntimeError)."""

_PIL_LIMIT = threading.Lock()  # of pixels: one number for all of PIL


class _Outside(ValueError):
    """A path that an image folder does not lead to."""


class _TooLarge(ValueError):
    """An image with more pixels than allowed."""


@dataclass(frozen=True)
class ImageFolder:
    """A folder that image paths may not leave, and the largest image taken from it.

    Attributes:
        root: the folder that paths are relative to; None where images come as bytes.
        max_megapixels: an image with more pixels is refused before it is decoded.
        follow_links: whether a symbolic link inside the folder may lead out of it.
        squared: whether images are put on a square before they are made smaller, as by ``pad``:
            then that square may not have more pixels.
    """

    root: Path | None
    max_megapixels: float = 100.0
    follow_links: bool = False
    squared: bool = False

    def locate(self, relative: str) -> Path:
        """Find an image file.

        Raises:
            ValueError: the path is absolute, climbs out of the folder, or leads out by a link.
            FileNotFoundError: there is no such file.
        """
        if self.root is None:
            raise _Outside(
                f"path {relative!r} given but no image folder: set data.images to the folder that "
                "the paths are relative to"
            )
        parts = Path(relative).parts
        if Path(relative).is_absolute() or ".." in parts or not parts:
            raise _Outside(
                f"path {relative!r} must be relative and stay inside the image folder {self.root}"
            )
        path = self.root / relative
        if not self.follow_links and not path.resolve().is_relative_to(self.root.resolve()):
            raise _Outside(
                f"path {relative!r} leads out of the image folder {self.root} through a symbolic "
                "link; set data.follow_links=true if that is meant"
            )
        if not path.is_file():
            raise FileNotFoundError(f"no image file {path}")
        return path

    def decode(self, image: str | bytes) -> Image.Image:
        """Decode an image, given by its path in the folder or by its bytes; see ``to_rgb``."""
        with self._opened(image) as opened:
            opened.load()  # a plain RGB image is passed on as it is, and its file closed
            return to_rgb(opened)

    def size_hw(self, image: str | bytes) -> tuple[int, int]:
        """Height and width of an image from its header alone.

        A PNG can have its orientation behind its pixels, and PIL would decode them to look: such a
        one is not seen here. What trains comes from the decoded image.
        """
        with self._opened(image) as opened:
            exif = Image.Image.getexif(opened)  # a PNG's own method is the one that decodes
            turned = exif.get(_ORIENTATION, 1) in _TURNED
            return (opened.width, opened.height) if turned else (opened.height, opened.width)

    @contextmanager
    def _opened(self, image: str | bytes) -> Iterator[Image.Image]:
        """An image of which the header has been read, and whose size is allowed."""
        file = io.BytesIO(image) if isinstance(image, bytes) else self.locate(image)
        try:
            with _pil_limit(self.max_megapixels), Image.open(file) as opened:
                self._check_size(opened.size)
                yield opened
        except Image.DecompressionBombError as error:
            own = f"data.max_megapixels={self.max_megapixels:g}"
            limit = own if math.isfinite(self.max_megapixels) else "PIL's own limit"
            raise _TooLarge(f"{error} ({limit})") from error

    def content(self, image: str | bytes) -> bytes:
        """The bytes of an image file."""
        return image if isinstance(image, bytes) else self.locate(image).read_bytes()

    def _check_size(self, size_wh: tuple[int, int]) -> None:
        width, height = size_wh
        text = f"image of {height} x {width} pixels (height x width)"
        if self.squared:
            height = width = max(size_wh)
            text += f", put on a square of {height} x {width} by data.image_aspect_ratio=pad,"
        megapixels = height * width / 1e6
        if megapixels > self.max_megapixels:
            raise _TooLarge(
                f"{text} is {megapixels:.1f} megapixels, more than "
                f"data.max_megapixels={self.max_megapixels:g}"
            )


@contextmanager
def _pil_limit(megapixels: float) -> Iterator[None]:
    """Let PIL open what is allowed here, and nothing larger; its own limit where all is allowed.

    PIL asks one number of the whole process, so it is put back, and one thread has it at a time.
    """
    if not math.isfinite(megapixels):
        yield
        return
    with _PIL_LIMIT:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = math.ceil(megapixels * 1e6)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


@dataclass(frozen=True)
class ImageRef:
    """An image of a row: where it is, and what to call it when it fails."""

    folder: ImageFolder
    image: str | bytes
    where: str

    def load(self) -> Image.Image:
        """Decode to RGB.

        Raises:
            DataError: the file is missing, corrupt, too large, or outside its folder.
        """
        return self._guard(self.folder.decode)

    def size_hw(self) -> tuple[int, int]:
        """Height and width, from the header."""
        return self._guard(self.folder.size_hw)

    def content(self) -> bytes:
        """The file as it is, not decoded."""
        return self._guard(self.folder.content)

    def _guard(self, read: Callable[[str | bytes], Read]) -> Read:
        name = self.image if isinstance(self.image, str) else f"{len(self.image)} bytes"
        cause: Exception
        try:
            return read(self.image)
        except FileNotFoundError as error:
            kind, text, cause = "missing image", str(error), error
        except UnidentifiedImageError as error:
            kind, cause = "corrupt image", error
            text = f"{name} is not an image that can be read (corrupt?)"
        except _TooLarge as error:
            kind, text, cause = "image too large", str(error), error
        except _Outside as error:
            kind, text, cause = "image outside its folder", str(error), error
        except _CORRUPT as error:
            kind, cause = "corrupt image", error
            text = f"{name} cannot be decoded (corrupt?): {error}"
        raise DataError(f"{self.where}: {text}", kind) from cause


_ANY_SIZE = ImageFolder(None, max_megapixels=math.inf)  # PIL's own limit stays


def image_of_bytes(content: bytes, where: str) -> ImageRef:
    """An encoded image, and what to call it when it fails."""
    return ImageRef(_ANY_SIZE, content, where)
