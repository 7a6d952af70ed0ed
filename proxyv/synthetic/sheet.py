"""A sheet of paper that remembers every character written on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from proxyv.synthetic.fonts import Family, families, load_font
from proxyv.synthetic.page import Glyph, Split

__all__ = ["Sheet", "Style", "TextTooLong", "random_style"]

Colour = tuple[int, int, int]
Align = Literal["left", "right", "centre"]


class TextTooLong(ValueError):
    """A text does not fit where it should stand; whoever composes the page draws it again."""


@dataclass(frozen=True)
class Style:
    """How a sheet looks: typeface, sizes in pixels, colours."""

    family: Family
    regular: str
    bold: str
    size_px: int
    leading_px: int
    margin_px: int
    ink: Colour
    paper: Colour
    accent: Colour
    tint: Colour


def random_style(rng: np.random.Generator, split: Split) -> Style:
    """Draw a style from the typefaces of one split; text is always clearly darker than paper."""
    choices = families(split)
    family = choices[int(rng.integers(len(choices)))]
    size = int(rng.choice([10, 11, 11, 12, 13, 14]))
    ink = int(rng.integers(0, 70))
    paper = int(rng.integers(225, 256))
    cast = rng.integers(-10, 11, size=3)
    accent = rng.integers(0, 130, size=3)
    return Style(
        family=family,
        regular=str(rng.choice(family.regular)),
        bold=str(rng.choice(family.bold)),
        size_px=size,
        leading_px=size + int(rng.integers(2, 5)),
        margin_px=int(rng.integers(4, 11)),
        ink=(ink, ink, min(255, ink + int(rng.integers(0, 60)))),
        paper=_clip(paper + cast),
        accent=_clip(accent),
        tint=_clip(paper - rng.integers(12, 40, size=3)),
    )


def _clip(values: np.ndarray) -> Colour:
    red, green, blue = (int(v) for v in np.clip(values, 0, 255))
    return red, green, blue


@cache
def _middle_px(family: Family, face: str, size_px: int) -> float:
    """Height of the middle of lower-case letters above the base line."""
    font = load_font(family, face, size_px)
    box = font.getbbox("x", anchor="ls")
    return -(box[1] + box[3]) / 2


@cache
def _advance_px(family: Family, face: str, size_px: int, char: str) -> float:
    return load_font(family, face, size_px).getlength(char)


class Sheet:
    """Paper to write on. ``y`` is always the top of a line of text, in pixels from the top.

    Args:
        style: typeface, sizes and colours.
        size_hw: height and width in pixels.
    """

    def __init__(self, style: Style, size_hw: tuple[int, int]) -> None:
        self.style = style
        self.height, self.width = size_hw
        self.image = Image.new("RGB", (self.width, self.height), style.paper)
        self.draw = ImageDraw.Draw(self.image)
        self.glyphs: list[Glyph] = []
        self.lines: list[str] = []

    @property
    def left(self) -> int:
        """First column inside the margin."""
        return self.style.margin_px

    @property
    def right(self) -> int:
        """First column of the right margin."""
        return self.width - self.style.margin_px

    @property
    def inner(self) -> int:
        """Width between the margins."""
        return self.right - self.left

    def font(self, bold: bool, size_px: int | None = None) -> ImageFont.FreeTypeFont:
        """The sheet's face at a size."""
        face = self.style.bold if bold else self.style.regular
        return load_font(self.style.family, face, size_px or self.style.size_px)

    def length(self, text: str, bold: bool = False, size_px: int | None = None) -> float:
        """Width of a text in pixels."""
        return self.font(bold, size_px).getlength(text)

    def fits(self, text: str, room_px: float, bold: bool = False) -> bool:
        """Whether a text fits into so many pixels."""
        return self.length(text, bold) <= room_px

    def write(
        self,
        text: str,
        x: float,
        y: float,
        *,
        bold: bool = False,
        align: Align = "left",
        colour: Colour | None = None,
        size_px: int | None = None,
    ) -> float:
        """Write one line and remember its characters; returns the x behind it.

        Raises:
            TextTooLong: a character would leave the sheet; a question about a cut-off word would
                have no fair answer.
        """
        size = size_px or self.style.size_px
        face = self.style.bold if bold else self.style.regular
        font = load_font(self.style.family, face, size)
        length = font.getlength(text)
        start = {"left": x, "right": x - length, "centre": x - length / 2}[align]
        baseline = y + size * 0.82
        if start < -0.5 or start + length > self.width + 0.5 or baseline > self.height:
            raise TextTooLong(f"text {text!r} at ({start:.0f}, {y:.0f}) leaves the sheet")
        self.draw.text(
            (start, baseline), text, font=font, fill=colour or self.style.ink, anchor="ls"
        )
        middle = baseline - _middle_px(self.style.family, face, size)
        pen = start
        for char in text:
            advance = _advance_px(self.style.family, face, size, char)
            if not char.isspace():
                self.glyphs.append(Glyph(char, pen + advance / 2, middle))
            pen += advance
        self.lines.append(text)
        return start + length

    def rule(self, y: float, *, dashed: bool = False, width_px: int = 1) -> None:
        """A horizontal line between the margins."""
        if dashed:
            for x in range(self.left, self.right, 6):
                self.draw.line([(x, y), (x + 3, y)], fill=self.style.ink, width=width_px)
        else:
            self.draw.line([(self.left, y), (self.right, y)], fill=self.style.ink, width=width_px)

    def box(
        self, x0: float, y0: float, x1: float, y1: float, *, fill: Colour | None = None
    ) -> None:
        """A frame, or a filled area when ``fill`` is given."""
        if fill is None:
            self.draw.rectangle([x0, y0, x1, y1], outline=self.style.accent)
        else:
            self.draw.rectangle([x0, y0, x1, y1], fill=fill)
