"""A sheet that charts are drawn on with matplotlib, in pixels, and that remembers every character.

Matplotlib's artists are placed by hand in pixel coordinates (origin top left, as in the picture)
instead of through its axes: that is several times faster, and the place of each character is known
from the same hinted layout that the Agg renderer uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg, get_hinting_flag
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle, Wedge
from matplotlib.text import Text
from matplotlib.transforms import IdentityTransform
from PIL import Image

from proxyv.synthetic.page import Glyph

__all__ = ["Anchor", "Box", "Face", "Sheet", "Written"]

Anchor = Literal["left", "center", "right"]
DPI = 72  # so that a point is a pixel
# From matplotlib 3.11 on, text is shaped and may hold ligatures; every character must stay itself.
_FEATURES = ("-liga", "-clig", "-dlig", "-calt") if hasattr(Text, "set_fontfeatures") else None


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, origin top left."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        """Horizontal extent."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Vertical extent."""
        return self.bottom - self.top

    def overlaps(self, other: Box, margin: float = 0.0) -> bool:
        """Whether the two come nearer than ``margin`` to each other."""
        return (
            self.left < other.right + margin
            and other.left < self.right + margin
            and self.top < other.bottom + margin
            and other.top < self.bottom + margin
        )


@dataclass(frozen=True)
class Face:
    """A font file at a size; ``em`` is the em height in pixels."""

    path: str
    em: float

    def width(self, text: str) -> float:
        """Advance width of a text in pixels."""
        return _measure(self, text).width

    def rough_width(self, text: str) -> float:
        """Advance width without kerning: much faster, for trying many texts."""
        return sum(_shape(self, char)[1] for char in text)

    @property
    def cap(self) -> float:
        """Height of a capital letter in pixels."""
        return -_measure(self, "H").boxes[0].top

    @property
    def properties(self) -> FontProperties:
        """The face as matplotlib wants it."""
        return _properties(self)


@dataclass(frozen=True)
class _Measured:
    """Ink boxes of a text's characters about its origin (y downwards), and its advance width."""

    boxes: tuple[Box, ...]
    width: float


@lru_cache(maxsize=256)
def _properties(face: Face) -> FontProperties:
    return FontProperties(fname=face.path, size=face.em)


@lru_cache(maxsize=16384)
def _shape(face: Face, char: str) -> tuple[Box, float]:
    """Ink box of one character about its origin (y downwards), and its advance width."""
    font = get_font(face.path)
    font.set_size(face.em, DPI)
    glyph = font.load_char(ord(char), flags=get_hinting_flag())
    left, top = glyph.horiBearingX / 64, -glyph.horiBearingY / 64
    box = Box(left, top, left + glyph.width / 64, top + glyph.height / 64)
    return box, glyph.horiAdvance / 64


@lru_cache(maxsize=8192)
def _measure(face: Face, text: str) -> _Measured:
    """Lay the text out as the Agg renderer does."""
    font = get_font(face.path)
    font.clear()
    font.set_size(face.em, DPI)
    flags = get_hinting_flag()
    features: dict[str, Any] = {} if _FEATURES is None else {"features": _FEATURES}
    places = font.set_text(text, 0.0, flags=flags, **features)
    if len(places) != len(text):
        raise ValueError(f"text {text!r}: {face.path} draws it as {len(places)} shapes")
    boxes, end = [], 0.0
    for char, (x, _) in zip(text, places, strict=True):
        ink, advance = _shape(face, char)
        boxes.append(Box(ink.left + x / 64, ink.top, ink.right + x / 64, ink.bottom))
        end = x / 64 + advance
    return _Measured(tuple(boxes), end)


@dataclass(frozen=True)
class Written:
    """One line of text on the sheet: where its origin lies and the box that its ink fills."""

    text: str
    face: Face
    x: float
    baseline: float
    box: Box

    def glyphs(self) -> list[Glyph]:
        """The visible characters: x in the middle of the ink, one y for the whole line.

        The height is the middle of lower-case letters, as on documents, so that a line does not
        fall into two rows of patches because of its commas and descenders.
        """
        boxes = _measure(self.face, self.text).boxes
        middle = self.baseline + _measure(self.face, "x").boxes[0].top / 2
        return [
            Glyph(char, self.x + (box.left + box.right) / 2, middle)
            for char, box in zip(self.text, boxes, strict=True)
            if char != " "
        ]


@dataclass
class Sheet:
    """Collects shapes and texts; nothing is drawn before :meth:`render`.

    Attributes:
        size_hw: height and width in pixels.
        background: colour of the paper.
        texts: what has been written so far.
    """

    size_hw: tuple[int, int]
    background: str
    texts: list[Written] = field(default_factory=list)
    _makers: list[tuple[bool, Callable[[], Artist]]] = field(default_factory=list)

    def rectangle(
        self, box: Box, fill: str, edge: str = "none", hatch: str | None = None, line: float = 0.0
    ) -> None:
        """A filled rectangle."""
        corner = (box.left, self.size_hw[0] - box.bottom)
        look: dict[str, Any] = {
            "facecolor": fill,
            "edgecolor": edge,
            "hatch": hatch,
            "linewidth": line,
        }
        self._makers.append((False, partial(Rectangle, corner, box.width, box.height, **look)))

    def line(self, points: Sequence[tuple[float, float]], color: str, **options: Any) -> None:
        """A polyline through (x, y) points; ``options`` are those of ``Line2D``."""
        xs = [x for x, _ in points]
        ys = [self.size_hw[0] - y for _, y in points]
        self._makers.append((False, partial(Line2D, xs, ys, color=color, **options)))

    def wedge(
        self,
        centre: tuple[float, float],
        radius: float,
        degrees: tuple[float, float],
        fill: str,
        edge: str,
        ring: float | None = None,
    ) -> None:
        """A slice of a pie between two angles (counter-clockwise from the right), or of a ring."""
        place = (centre[0], self.size_hw[0] - centre[1])
        look: dict[str, Any] = {"facecolor": fill, "edgecolor": edge, "linewidth": 1.0}
        self._makers.append((False, partial(Wedge, place, radius, *degrees, width=ring, **look)))

    def write(
        self,
        text: str,
        x: float,
        middle: float,
        face: Face,
        color: str,
        anchor: Anchor = "center",
        *,
        behind: str | None = None,
    ) -> Written:
        """Write one horizontal line; capitals are centred on the height ``middle``.

        ``behind`` is the colour of a patch below the text, where it may cross other lines.
        """
        measured = _measure(face, text)
        shift = {"left": 0.0, "center": measured.width / 2, "right": measured.width}[anchor]
        origin, baseline = float(round(x - shift)), float(round(middle + face.cap / 2))
        boxes = [box for char, box in zip(text, measured.boxes, strict=True) if char != " "]
        ink = Box(
            origin + min(box.left for box in boxes),
            baseline + min(box.top for box in boxes),
            origin + max(box.right for box in boxes),
            baseline + max(box.bottom for box in boxes),
        )
        if behind is not None:
            self.rectangle(
                Box(ink.left - 0.5, ink.top - 1, ink.right + 0.5, ink.bottom + 0.5), behind
            )
        self._makers.append((True, partial(self._text, text, origin, baseline, face, color)))
        written = Written(text, face, origin, baseline, ink)
        self.texts.append(written)
        return written

    def _text(self, text: str, x: float, baseline: float, face: Face, color: str) -> Text:
        artist = Text(
            x,
            self.size_hw[0] - baseline,
            text,
            color=color,
            fontproperties=face.properties,
            horizontalalignment="left",
            verticalalignment="baseline",
            parse_math=False,
        )
        if _FEATURES is not None:
            artist.set_fontfeatures(_FEATURES)
        return artist

    def is_legible(self, margin: float = 1.0) -> bool:
        """Whether all texts lie on the sheet and none touches another."""
        height, width = self.size_hw
        boxes = [written.box for written in self.texts]
        if any(
            b.left < 1 or b.top < 1 or b.right > width - 1 or b.bottom > height - 1 for b in boxes
        ):
            return False
        return not any(
            boxes[i].overlaps(boxes[j], margin) for i in range(len(boxes)) for j in range(i)
        )

    def glyphs(self) -> list[Glyph]:
        """Every visible character in reading order: line by line, each from left to right."""
        rows: list[list[Written]] = []
        for written in sorted(self.texts, key=lambda item: item.baseline):
            same = rows and written.baseline - rows[-1][0].baseline <= 0.4 * written.face.em
            if same:
                rows[-1].append(written)
            else:
                rows.append([written])
        return [
            glyph
            for row in rows
            for written in sorted(row, key=lambda item: item.x)
            for glyph in written.glyphs()
        ]

    def render(self, *, texts: bool = True) -> Image.Image:
        """Draw everything (without the texts if asked, to see what ink is theirs)."""
        height, width = self.size_hw
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=self.background)
        canvas = FigureCanvasAgg(figure)
        for order, (is_text, make) in enumerate(self._makers):
            if texts or not is_text:
                artist = make()
                artist.set_transform(IdentityTransform())
                artist.set_zorder(order)
                figure.add_artist(artist)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        if pixels.shape[:2] != (height, width):
            raise ValueError(f"size_hw {self.size_hw}: matplotlib drew {pixels.shape[:2]} pixels")
        return Image.fromarray(np.ascontiguousarray(pixels))


def polar(centre: tuple[float, float], radius: float, degrees: float) -> tuple[float, float]:
    """The point at an angle (counter-clockwise from the right) and distance, y downwards."""
    angle = math.radians(degrees)
    return centre[0] + radius * math.cos(angle), centre[1] - radius * math.sin(angle)
