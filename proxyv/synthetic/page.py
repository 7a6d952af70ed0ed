"""A rendered page of the small world: the picture, what stands on it, questions about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

__all__ = ["Glyph", "Page", "Question", "Split", "looks_of", "words_of"]

Split = Literal["train", "test", "familiar"]
"""The halves of the small world, which share no word, typeface, look or layout; ``familiar`` pages
are held out like those of ``test``, with its words, but look like those of ``train``."""


def words_of(split: Split) -> Split:
    """The half whose words and values a page has."""
    return "test" if split == "familiar" else split


def looks_of(split: Split) -> Split:
    """The half whose typefaces, looks and layouts a page has."""
    return "train" if split == "familiar" else split


@dataclass(frozen=True)
class Glyph:
    """One visible character and the pixel position of its centre (origin top left)."""

    char: str
    x: float
    y: float


@dataclass(frozen=True)
class Question:
    """A question with every accepted answer (the first is the one trained on).

    Attributes:
        text: the question as a person would ask it, without any instruction behind it.
        answers: accepted answers; evaluation takes the best match.
        kind: what must be done to answer, such as "lookup", "extremum" or "compare".
    """

    text: str
    answers: tuple[str, ...]
    kind: str


@dataclass
class Page:
    """One picture of the small world.

    Attributes:
        image: RGB picture.
        glyphs: every visible character, in reading order; spaces are left out.
        caption: what is written or drawn, in reading order.
        questions: questions whose answers can be seen in the picture.
        template: the layout's name, such as "invoice/split" or "bar/left/top".
        split: the half of the small world that the page belongs to, or ``familiar``.
        values_shown: for charts, whether the values are printed; true for documents.
        facts: for charts, their title and what the categories are.
    """

    image: Image.Image
    glyphs: list[Glyph]
    caption: str
    questions: list[Question]
    template: str
    split: Split
    values_shown: bool = True
    facts: dict[str, str] = field(default_factory=dict)
