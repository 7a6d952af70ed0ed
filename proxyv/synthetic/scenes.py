"""Pictures of coloured shapes and signs: what photographs are to the other benchmarks.

Every thing has a place of its own in a grid of three by three, a colour and a shape that no other
thing has together, and a known bounding box, so that questions about colours, numbers, places and
boxes have exactly one answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from proxyv.synthetic.fonts import families, load_font
from proxyv.synthetic.page import Split
from proxyv.synthetic.words import Words

__all__ = ["COLOURS", "SHAPES", "Scene", "Thing", "draw_word", "make_scene"]

COLOURS = {
    "red": (200, 40, 40),
    "blue": (40, 70, 190),
    "green": (40, 140, 60),
    "yellow": (235, 200, 40),
    "purple": (130, 50, 160),
    "orange": (235, 130, 30),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "diamond")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
SIGN_COLOUR = (250, 250, 245)
MIN_TEXT_PX, MAX_TEXT_PX = 8, 40

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Thing:
    """One thing in a scene.

    Attributes:
        colour: its colour's name; a sign's is "white".
        shape: one of `SHAPES`, or "sign".
        row: 0 to 2 from the top.
        column: 0 to 2 from the left.
        box: left, top, right and bottom edge in pixels; the right and bottom ones lie outside.
        word: what is written on a sign, else empty.
    """

    colour: str
    shape: str
    row: int
    column: int
    box: Box
    word: str = ""

    @property
    def name(self) -> str:
        """What nothing else in the scene is called: "red circle"."""
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """Where it is: "top left"."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """A picture, its shapes in random order, and its one sign."""

    image: Image.Image
    shapes: tuple[Thing, ...]
    sign: Thing


def make_scene(
    rng: np.random.Generator, split: Split, size_hw: tuple[int, int] = (168, 168)
) -> Scene:
    """Draw two to five shapes and a sign with a word.

    Args:
        rng: source of everything random; the same state gives the same scene.
        split: decides the word and its typeface.
        size_hw: height and width in pixels.
    """
    height, width = size_hw
    paper = tuple(int(value) for value in rng.integers(205, 245, size=3))
    image = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(image)
    count = int(rng.integers(2, 6))
    cells = [(int(cell) // 3, int(cell) % 3) for cell in rng.permutation(9)[: count + 1]]
    kinds = rng.permutation(len(COLOURS) * len(SHAPES))[:count]
    shapes = []
    for (row, column), kind in zip(cells, kinds, strict=False):
        colour, shape = list(COLOURS)[kind // len(SHAPES)], SHAPES[kind % len(SHAPES)]
        size = float(rng.uniform(0.5, 0.9)) * min(height, width) / 3
        box = _cell_box(row, column, size, size, size_hw)
        _SHAPE_DRAWERS[shape](draw, box, COLOURS[colour])
        shapes.append(Thing(colour, shape, row, column, box))
    row, column = cells[count]
    box = _cell_box(row, column, 0.3 * width, 0.16 * height, size_hw)
    word = Words(rng, split).noun(8)
    left, top, right, bottom = box
    draw.rectangle((left, top, right - 1, bottom - 1), fill=SIGN_COLOUR, outline=(60, 60, 60))
    draw_word(image, rng, split, word, box)
    sign = Thing("white", "sign", row, column, box, word)
    return Scene(image, tuple(shapes), sign)


def draw_word(
    image: Image.Image,
    rng: np.random.Generator,
    split: Split,
    word: str,
    box: Box,
    ink: tuple[int, int, int] = (20, 20, 20),
) -> None:
    """Write one line as large as it fits into the middle of a box, in a typeface of the split.

    Raises:
        ValueError: it does not fit even in the smallest size.
    """
    left, top, right, bottom = box
    choices = families(split)
    family = choices[int(rng.integers(len(choices)))]
    face = str(rng.choice(family.bold))
    for size in range(min(MAX_TEXT_PX, bottom - top - 2), MIN_TEXT_PX - 1, -1):
        font = load_font(family, face, size)
        if font.getlength(word) <= right - left - 4:
            middle = ((left + right) / 2, (top + bottom) / 2)
            ImageDraw.Draw(image).text(middle, word, font=font, fill=ink, anchor="mm")
            return
    raise ValueError(f"word {word!r} does not fit into a box of {right - left} pixels")


def _cell_box(row: int, column: int, width: float, height: float, size_hw: tuple[int, int]) -> Box:
    """A box of a size in the middle of a cell of the grid."""
    y = (row + 0.5) * size_hw[0] / 3
    x = (column + 0.5) * size_hw[1] / 3
    left, top = round(x - width / 2), round(y - height / 2)
    return left, top, left + round(width), top + round(height)


def _polygon(
    corners: tuple[tuple[float, float], ...],
) -> Callable[[ImageDraw.ImageDraw, Box, tuple[int, int, int]], None]:
    """A drawer of the polygon with these corners, as fractions of its box."""

    def draw_it(draw: ImageDraw.ImageDraw, box: Box, colour: tuple[int, int, int]) -> None:
        left, top, right, bottom = box
        width, height = right - 1 - left, bottom - 1 - top
        draw.polygon([(left + x * width, top + y * height) for x, y in corners], fill=colour)

    return draw_it


def _circle(draw: ImageDraw.ImageDraw, box: Box, colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    draw.ellipse((left, top, right - 1, bottom - 1), fill=colour)


_SHAPE_DRAWERS: dict[str, Callable[[ImageDraw.ImageDraw, Box, tuple[int, int, int]], None]] = {
    "circle": _circle,
    "square": _polygon(((0, 0), (1, 0), (1, 1), (0, 1))),
    "triangle": _polygon(((0.5, 0), (1, 1), (0, 1))),
    "diamond": _polygon(((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5))),
}
