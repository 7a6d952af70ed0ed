"""What the training half holds besides documents and charts: scenes, words, dense pages.

Together they train for InfographicVQA, TextVQA, OCRBench, boxes of RefCOCO and page parsing.
A kind asks in the words of its benchmark, and answers as that benchmark's measure wants it. Every
value, typeface and layout is of the training half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from proxyv.synthetic.degrade import degrade
from proxyv.synthetic.documents import make_document
from proxyv.synthetic.infographics import make_infographic
from proxyv.synthetic.page import Page, Split
from proxyv.synthetic.prompts import BOX_PROMPT, DOCUMENT_PROMPT, PAGE_PROMPT, SIGN_QUESTION
from proxyv.synthetic.scenes import Box, make_scene
from proxyv.synthetic.tables import png_bytes
from proxyv.synthetic.word_images import WRITTEN, word_image, word_question
from proxyv.synthetic.words import Words

__all__ = ["KINDS", "Row", "Sizes", "box_text", "draw_row"]

SPLIT: Split = "train"
BOXES = 2  # of a scene; to ask for one takes 260 characters
DOCUMENT_SHARE = 0.2  # of the pictures that OCRBench asks about, as there

Turns = tuple[tuple[str, str], ...]


class Row(NamedTuple):
    """One picture for training.

    Attributes:
        png: the picture as a file.
        caption: what it shows.
        turns: prompts, as evaluation asks them, with their answers.
    """

    png: bytes
    caption: str
    turns: Turns


class Sizes(NamedTuple):
    """Sides of ordinary and of dense pictures in pixels; the most turns about one picture."""

    side_px: int
    dense_px: int
    most: int


def draw_row(seed: tuple[int, ...], kind: str, sizes: Sizes) -> Row:
    """The row of a seed; the same seed always gives the same row.

    Args:
        seed: where all randomness comes from.
        kind: a key of `KINDS`.
        sizes: of the picture, and how much is asked about it.
    """
    return KINDS[kind](np.random.default_rng(seed), sizes)


def box_text(box: Box, size_hw: tuple[int, int]) -> str:
    """A box as RefCOCO's measure reads it: "[left, top, right, bottom]", shares of the picture.

    Args:
        box: left, top, right and bottom edge in pixels.
        size_hw: height and width of the picture in pixels.
    """
    height, width = size_hw
    left, top, right, bottom = box
    shares = (left / width, top / height, right / width, bottom / height)
    return f"[{', '.join(f'{share:.2f}' for share in shares)}]"


def _scene(rng: np.random.Generator, sizes: Sizes) -> Row:
    """TextVQA's question or OCRBench's, and boxes of RefCOCO."""
    size_hw = sizes.side_px, sizes.side_px
    scene = make_scene(rng, SPLIT, size_hw)
    suffix = DOCUMENT_PROMPT if rng.random() < 0.5 else ""  # OCRBench asks without
    turns = [(SIGN_QUESTION + suffix, scene.sign.word)]
    things = (*scene.shapes, scene.sign)
    for index in rng.permutation(len(things))[:BOXES]:
        thing = things[int(index)]
        sentence = thing.sentences[int(rng.integers(2))]
        turns.append((BOX_PROMPT + sentence, box_text(thing.box, size_hw)))
    return Row(png_bytes(scene.image), scene.caption, _some(rng, turns, sizes.most))


def _word(rng: np.random.Generator, sizes: Sizes) -> Row:
    """OCRBench: one line of text, or a document with questions and no instruction behind them."""
    if rng.random() < DOCUMENT_SHARE:
        page = _worn(make_document, rng, sizes.side_px)
        asked = [(question.text, question.answers[0]) for question in page.questions]
        return Row(png_bytes(page.image), page.caption, _some(rng, asked, sizes.most))
    category = list(WRITTEN)[int(rng.integers(len(WRITTEN)))]
    text = WRITTEN[category](Words(rng, SPLIT))
    image = word_image(rng, SPLIT, text, category, sizes.side_px)
    return Row(png_bytes(image), text, ((word_question(category), text),))


def _infographic(rng: np.random.Generator, sizes: Sizes) -> Row:
    """InfographicVQA: as documents are asked, questions about charts too."""
    page = _worn(make_infographic, rng, sizes.dense_px)
    asked = [(question.text + DOCUMENT_PROMPT, question.answers[0]) for question in page.questions]
    return Row(png_bytes(page.image), page.caption, _some(rng, asked, sizes.most))


def _page(rng: np.random.Generator, sizes: Sizes) -> Row:
    """CCpdf: all text of a document."""
    page = _worn(make_document, rng, sizes.dense_px)
    return Row(png_bytes(page.image), page.caption, ((PAGE_PROMPT, page.caption),))


def _worn(
    make: Callable[[np.random.Generator, Split, tuple[int, int]], Page],
    rng: np.random.Generator,
    side_px: int,
) -> Page:
    return degrade(make(rng, SPLIT, (side_px, side_px)), rng)


def _some(rng: np.random.Generator, turns: list[tuple[str, str]], most: int) -> Turns:
    """At most so many turns, in random order."""
    return tuple(turns[int(index)] for index in rng.permutation(len(turns))[:most])


KINDS: dict[str, Callable[[np.random.Generator, Sizes], Row]] = {
    "scene": _scene,
    "word": _word,
    "infographic": _infographic,
    "page": _page,
}
"""Names of pictures and of their ``data_source``, and what draws a row."""
