"""Words in rows and columns, with questions about neighbours: what stands above this word?

On a chart a value stands above its name, and to find it takes three steps: to find the name, to
take its column, to look up that column. Pages of nothing else teach it within minutes; only the
pretraining of the tiny backbones uses them (docs/log.md).
"""

from __future__ import annotations

import numpy as np

from proxyv.synthetic.page import Page, Question, Split
from proxyv.synthetic.sheet import Sheet, TextTooLong, random_style
from proxyv.synthetic.words import Words

__all__ = ["make_word_grid"]

NEIGHBOURS = {"above": (-1, 0), "below": (1, 0), "left of": (0, -1), "right of": (0, 1)}
SHARES = (0.38, 0.38, 0.16, 0.08)  # the next word is found without any notion of columns
MAX_WORD = 7
MAX_QUESTIONS = 8


def make_word_grid(
    rng: np.random.Generator, split: Split, size_hw: tuple[int, int] = (168, 168)
) -> Page:
    """Draw two to four rows of two or three words, with a question for up to eight neighbours.

    Args:
        rng: source of everything random; the same state gives the same page.
        split: decides typefaces and words.
        size_hw: height and width in pixels.
    """
    while True:
        sheet, words = Sheet(random_style(rng, split), size_hw), Words(rng, split)
        rows, columns = int(rng.integers(2, 5)), int(rng.integers(2, 4))
        try:
            grid = _write(sheet, words, rows, columns)
        except TextTooLong:
            continue
        caption = "\n".join(" ".join(row) for row in grid)
        return Page(sheet.image, sheet.glyphs, caption, _ask(rng, grid), "text/grid", split)


def _write(sheet: Sheet, words: Words, rows: int, columns: int) -> list[list[str]]:
    """Write different words, each centred near the middle of its column."""
    rng = words.rng
    makers = (
        lambda: words.first_name(MAX_WORD),
        lambda: words.noun(MAX_WORD),
        lambda: words.number(1, 1000),
        lambda: words.number(1, 1000),
    )
    leading = int(sheet.style.leading_px) + 1
    lines = (sheet.height - 4) // leading
    taken = np.sort(rng.choice(lines, size=min(rows, lines), replace=False))
    column_px = sheet.width / columns
    used: set[str] = set()
    grid = []
    for line in taken:
        row = []
        for column in range(columns):
            word = makers[int(rng.integers(len(makers)))]()
            if word in used or not sheet.fits(word, column_px - 12):
                raise TextTooLong(word)
            used.add(word)
            x = (column + 0.5) * column_px + float(rng.uniform(-4, 4))
            sheet.write(word, x, 2.0 + float(line) * leading, align="centre")
            row.append(word)
        grid.append(row)
    return grid


def _ask(rng: np.random.Generator, grid: list[list[str]]) -> list[Question]:
    """Different questions, each about one neighbour of one word."""
    rows, columns = len(grid), len(grid[0])
    found: dict[str, Question] = {}
    for _ in range(5 * MAX_QUESTIONS):
        where = list(NEIGHBOURS)[int(rng.choice(len(NEIGHBOURS), p=SHARES))]
        row, column = int(rng.integers(rows)), int(rng.integers(columns))
        down, across = row + NEIGHBOURS[where][0], column + NEIGHBOURS[where][1]
        if 0 <= down < rows and 0 <= across < columns and len(found) < MAX_QUESTIONS:
            text = f"What is {where} {grid[row][column]}?"
            found[text] = Question(text, (grid[down][across],), "neighbour")
    return list(found.values())
