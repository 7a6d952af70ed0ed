"""What stands for an image or a video in a text, and what takes its place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["VIDEO_MARK", "as_texts", "begin_anew", "expand_marks", "find_marks"]

VIDEO_MARK = "<video>"
"""What stands for a video in a text; unlike the image token it never reaches the tokenizer."""


def find_marks(*marks: str) -> re.Pattern[str]:
    """Matches any of these marks."""
    return re.compile("|".join(map(re.escape, marks)))


def expand_marks(
    texts: Sequence[str], counts: Sequence[int], marks: re.Pattern[str], image_token: str
) -> tuple[list[str], list[int]]:
    """Put image tokens where the texts have marks; also how many that makes in each text.

    Raises:
        ValueError: another number of marks than of ``counts``.
    """
    given = sum(len(marks.findall(text)) for text in texts)
    if given != len(counts):
        raise ValueError(f"the text has {given} {image_token}, but {len(counts)} images were given")
    supply: Iterator[int] = iter(counts)
    expanded = [marks.sub(lambda _: image_token * next(supply), text) for text in texts]
    return expanded, [text.count(image_token) for text in expanded]


def begin_anew(text: str, marks: re.Pattern[str], tokenizer: Any, image_token: str) -> str:
    """Let text behind an image begin as a text does, as it did in training.

    Sentencepiece vocabularies put a space before a text; a tokenizer that meets text behind a
    token does not, but LLaVA models are trained on pieces tokenized one by one.
    """
    begins = tokenizer.tokenize("a")[:1]
    if not begins or not begins[0].startswith("▁"):
        return text
    tokens = (image_token, VIDEO_MARK, *tokenizer.get_added_vocab())
    first, *rest = marks.split(text)
    found = marks.findall(text)
    rest = [part if not part or part.startswith(tokens) else " " + part for part in rest]
    return first + "".join(mark + part for mark, part in zip(found, rest, strict=True))


def as_texts(text: Any) -> list[str]:
    """One text or several, as a list."""
    texts = [text] if isinstance(text, str) else text if isinstance(text, list | tuple) else None
    if text is not None and (texts is None or not all(isinstance(t, str) for t in texts)):
        raise ValueError(
            f"text is a {type(text).__name__}: give a string or a list of strings; images come "
            "first, so name the arguments, as in processor(images=..., text=...)"
        )
    return list(texts or [])
