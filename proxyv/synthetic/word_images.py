"""One line of text on paper: what OCRBench's categories of single words and formulas show."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from proxyv.synthetic.page import Split, looks_of
from proxyv.synthetic.prompts import FORMULA_QUESTION, WORD_QUESTION
from proxyv.synthetic.scenes import COLOURS, draw_word
from proxyv.synthetic.words import Words

__all__ = ["BANDS", "FORMULA", "WRITTEN", "word_image", "word_question"]

FORMULA = "Handwritten Mathematical Expression Recognition"

WRITTEN: dict[str, Callable[[Words], str]] = {
    "Regular Text Recognition": Words.noun,
    "Irregular Text Recognition": Words.last_name,
    "Artistic Text Recognition": Words.first_name,
    "Handwriting Recognition": Words.first_name,
    "Digit String Recognition": lambda words: words.number(1000, 10**6),
    "Non-Semantic Text Recognition": lambda words: words.random_text(6),
    FORMULA: Words.sum,
}
"""The categories whose picture is one line, and what stands on it."""

BANDS: dict[Split, tuple[str, ...]] = {"train": ("top", "bottom"), "test": ("middle",)}
"""Thirds of the picture in which the line stands."""

_THIRDS = ("top", "middle", "bottom")
_PAPER = (235, 235, 225)


def word_question(category: str) -> str:
    """How OCRBench asks in one of its categories of `WRITTEN`."""
    return FORMULA_QUESTION if category == FORMULA else WORD_QUESTION


def word_image(
    rng: np.random.Generator, split: Split, text: str, category: str, side_px: int
) -> Image.Image:
    """Write one line; irregular text is turned about the middle of the picture, artistic is purple.

    Args:
        rng: source of everything random.
        split: decides typeface and place.
        text: the line.
        category: a key of `WRITTEN`.
        side_px: side of the picture in pixels.
    """
    image = Image.new("RGB", (side_px, side_px), _PAPER)
    bands = BANDS[looks_of(split)]
    top = _THIRDS.index(bands[int(rng.integers(len(bands)))]) * side_px // 3
    ink = COLOURS["purple"] if category.startswith("Artistic") else (20, 20, 20)
    draw_word(image, rng, split, text, (8, top, side_px - 8, top + side_px // 3), ink)
    if category.startswith("Irregular"):
        angle = float(rng.uniform(10, 25))
        image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=_PAPER)
    return image
