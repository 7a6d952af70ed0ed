"""Pictures of coloured shapes and signs: what photographs are to the other benchmarks.

Every thing has a place of its own in a grid of three by three, a colour and a shape that no other
thing has together, and a known bounding box, so that questions about colours, numbers, places and
boxes have exactly one answer. Scenes for training are scattered: a thing stands anywhere in its
cell, and signs differ in size and colour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from proxyv.synthetic.fonts import families, load_font
from proxyv.synthetic.page import Split, looks_of
from proxyv.synthetic.words import Words

__all__ = [
    "COLOURS",
    "LAYOUTS",
    "SHAPES",
    "SIGN_COLOUR",
    "SIGN_LETTERS",
    "Scene",
    "Thing",
    "draw_word",
    "make_scene",
]

LAYOUTS: dict[Split, str] = {"train": "scattered", "test": "grid"}

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
SIGN_LETTERS = 6  # at most, so that they are large enough to be read
MIN_TEXT_PX, MAX_TEXT_PX = 8, 16  # the tiny tower has not learned to read larger letters

Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]


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

    @property
    def sentences(self) -> tuple[str, str]:
        """What is true of nothing else in the scene, as RefCOCO's people would write it."""
        which = f"sign that says {self.word}" if self.word else self.name
        return which, f"{self.shape} at the {self.place}"


@dataclass(frozen=True)
class Scene:
    """A picture, its shapes in random order, its one sign, and how it is laid out."""

    image: Image.Image
    shapes: tuple[Thing, ...]
    sign: Thing
    layout: str

    @property
    def caption(self) -> str:
        """What is where, a line each, in reading order."""
        things = sorted((*self.shapes, self.sign), key=lambda thing: (thing.row, thing.column))
        return "\n".join(f"{thing.sentences[0]} at the {thing.place}" for thing in things)


def make_scene(
    rng: np.random.Generator, split: Split, size_hw: tuple[int, int] = (168, 168)
) -> Scene:
    """Draw two to five shapes and a sign with a word.

    Args:
        rng: source of everything random; the same state gives the same scene.
        split: decides the layout, the word and its typeface.
        size_hw: height and width in pixels.
    """
    height, width = size_hw
    layout = LAYOUTS[looks_of(split)]
    scattered = layout == "scattered"
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
        box = _cell_box(row, column, size, size, size_hw, rng if scattered else None)
        _SHAPE_DRAWERS[shape](draw, box, COLOURS[colour])
        shapes.append(Thing(colour, shape, row, column, box))
    row, column = cells[count]
    stretch = float(rng.uniform(1.0, 1.1)) if scattered else 1.0
    sign_px = (0.3 * width * stretch, 0.16 * height / stretch)
    box = _cell_box(row, column, *sign_px, size_hw, rng if scattered else None)
    word = Words(rng, split).noun(SIGN_LETTERS)
    left, top, right, bottom = box
    fill, outline = _sign_colours(rng) if scattered else (SIGN_COLOUR, (60, 60, 60))
    draw.rectangle((left, top, right - 1, bottom - 1), fill=fill, outline=outline)
    draw_word(image, rng, split, word, box)
    sign = Thing("white", "sign", row, column, box, word)
    return Scene(image, tuple(shapes), sign, layout)


def _sign_colours(rng: np.random.Generator) -> tuple[Colour, Colour]:
    """A light face and a frame of any colour."""
    face, frame = rng.integers(235, 256, size=3), rng.integers(0, 140, size=3)
    return tuple(map(int, face)), tuple(map(int, frame))  # type: ignore[return-value]


def draw_word(
    image: Image.Image,
    rng: np.random.Generator,
    split: Split,
    word: str,
    box: Box,
    ink: Colour = (20, 20, 20),
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


def _cell_box(
    row: int,
    column: int,
    width: float,
    height: float,
    size_hw: tuple[int, int],
    rng: np.random.Generator | None,
) -> Box:
    """A box of a size in a cell of the grid: anywhere, or in the middle without a generator."""
    cell_h, cell_w = size_hw[0] / 3, size_hw[1] / 3
    down, across = (0.5, 0.5) if rng is None else rng.uniform(0, 1, size=2)
    left = round(column * cell_w + across * (cell_w - width))
    top = round(row * cell_h + down * (cell_h - height))
    return left, top, left + round(width), top + round(height)


def _polygon(
    corners: tuple[tuple[float, float], ...],
) -> Callable[[ImageDraw.ImageDraw, Box, Colour], None]:
    """A drawer of the polygon with these corners, as fractions of its box."""

    def draw_it(draw: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
        left, top, right, bottom = box
        width, height = right - 1 - left, bottom - 1 - top
        draw.polygon([(left + x * width, top + y * height) for x, y in corners], fill=colour)

    return draw_it


def _circle(draw: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    left, top, right, bottom = box
    draw.ellipse((left, top, right - 1, bottom - 1), fill=colour)


_SHAPE_DRAWERS: dict[str, Callable[[ImageDraw.ImageDraw, Box, Colour], None]] = {
    "circle": _circle,
    "square": _polygon(((0, 0), (1, 0), (1, 1), (0, 1))),
    "triangle": _polygon(((0.5, 0), (1, 1), (0, 1))),
    "diamond": _polygon(((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5))),
}
