"""The fonts that the small world is set in; the test half uses families that training never sees.

All of them arrive with Python packages (matplotlib's own, the ``font-*`` packages and
``pymupdf-fonts``, under the Open Font, Ubuntu, Apache or Bitstream licences), so nothing is
downloaded and nothing depends on what a machine happens to have installed.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from PIL import ImageFont

from proxyv.synthetic.page import Split, looks_of

__all__ = ["FAMILIES", "Family", "families", "font_path", "load_font"]

_DEJAVU = "matplotlib:mpl-data/fonts/ttf"
_PACKED = "pymupdf_fonts"


@dataclass(frozen=True)
class Family:
    """A font family: where its files lie (``package:folder``), and which face to use for what.

    Faces of a package without a folder are the names that it gives them.
    """

    name: str
    place: str
    regular: tuple[str, ...]
    bold: tuple[str, ...]
    split: Split


FAMILIES: tuple[Family, ...] = (
    Family(
        "DejaVu Sans",
        _DEJAVU,
        ("DejaVuSans.ttf", "DejaVuSans-Oblique.ttf"),
        ("DejaVuSans-Bold.ttf",),
        "train",
    ),
    Family(
        "DejaVu Serif",
        _DEJAVU,
        ("DejaVuSerif.ttf", "DejaVuSerif-Italic.ttf"),
        ("DejaVuSerif-Bold.ttf",),
        "train",
    ),
    Family(
        "DejaVu Sans Mono",
        _DEJAVU,
        ("DejaVuSansMono.ttf",),
        ("DejaVuSansMono-Bold.ttf",),
        "train",
    ),
    Family(
        "Roboto",
        "font_roboto:files",
        ("Roboto-Regular.ttf", "Roboto-Medium.ttf", "Roboto-Italic.ttf"),
        ("Roboto-Bold.ttf",),
        "train",
    ),
    Family(
        "Caladea",
        "font_caladea:files",
        ("Caladea-Regular.ttf", "Caladea-Italic.ttf"),
        ("Caladea-Bold.ttf",),
        "train",
    ),
    Family(
        "Source Serif Pro",
        "font_source_serif_pro:files",
        ("SourceSerifPro-Regular.ttf", "SourceSerifPro-Semibold.ttf"),
        ("SourceSerifPro-Bold.ttf",),
        "train",
    ),
    Family(
        "Manrope",
        "font_manrope:files",
        ("Manrope-Regular.ttf", "Manrope-Medium.ttf"),
        ("Manrope-Bold.ttf",),
        "train",
    ),
    Family(
        "Hanken Grotesk",
        "font_hanken_grotesk:files",
        ("HankenGrotesk-Regular.otf", "HankenGrotesk-Medium.otf"),
        ("HankenGrotesk-Bold.otf",),
        "train",
    ),
    Family("FiraGO", _PACKED, ("figo", "figit"), ("figbo",), "train"),
    Family("Noto Sans", _PACKED, ("notos", "notosit"), ("notosbo",), "train"),
    Family("Ubuntu", _PACKED, ("ubuntu", "ubuntuit"), ("ubuntubo",), "train"),
    Family("Lato", "font_lato:files", ("Lato-Regular.ttf",), ("Lato-Bold.ttf",), "test"),
    Family(
        "Source Sans Pro",
        "font_source_sans_pro:files",
        ("SourceSansPro-Regular.ttf", "SourceSansPro-Semibold.ttf"),
        ("SourceSansPro-Bold.ttf",),
        "test",
    ),
    Family("STIX General", _DEJAVU, ("STIXGeneral.ttf",), ("STIXGeneralBol.ttf",), "test"),
)


def families(split: Split) -> list[Family]:
    """The families that the pages of a split are set in."""
    return [family for family in FAMILIES if family.split == looks_of(split)]


@cache
def font_path(family: Family, face: str) -> Path:
    """The file of one face of a family.

    Raises:
        ValueError: the Python package that carries the family is not installed.
    """
    package, _, folder = family.place.partition(":")
    try:
        path = _unpacked(face) if package == _PACKED else Path(str(files(package))) / folder / face
    except ModuleNotFoundError as error:
        raise ValueError(
            f"font family {family.name!r} comes with the package {package!r}, which is not "
            "installed: install the extra with `pip install 'proxyv[synthetic]'`"
        ) from error
    if not path.is_file():
        raise ValueError(f"font family {family.name!r}: {path} does not exist")
    return path


def _unpacked(face: str) -> Path:
    """The file of a face that its package holds as compressed bytes, in the user's own folder."""
    from pymupdf_fonts import fontbuffers, fontdescriptors

    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"proxyv-fonts-{user}"
    path = folder / f"{face}.ttf"
    if not path.is_file() or path.stat().st_size != fontdescriptors[face]["size"]:
        folder.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(fontbuffers[face]())
        os.replace(file.name, path)  # processes that draw side by side see all of it or nothing
    return path


@cache
def load_font(family: Family, face: str, size_px: int) -> ImageFont.FreeTypeFont:
    """A face at a size, for Pillow (``size_px`` is the em height in pixels)."""
    layout = ImageFont.Layout.BASIC
    return ImageFont.truetype(str(font_path(family, face)), size_px, layout_engine=layout)
