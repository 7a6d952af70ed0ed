"""Dense pages: a chart and a document among lines of other text, four panels two by two.

Both have questions; the other two panels hide where the answers stand, or are left empty. A panel
is as large and as full as a page of its own, so four tiles of a crop each show one at its own size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, permutations, zip_longest

import numpy as np
from PIL import Image

from proxyv.synthetic.charts import make_chart
from proxyv.synthetic.documents import make_document, make_text_page
from proxyv.synthetic.page import Glyph, Page, Question, Split, looks_of

__all__ = ["LAYOUTS", "make_infographic"]

Maker = Callable[[np.random.Generator, Split, tuple[int, int]], Page]

_TEST_LAYOUTS = ((0, 3), (3, 0), (1, 2))
LAYOUTS: dict[Split, tuple[tuple[int, int], ...]] = {
    "train": tuple(pair for pair in permutations(range(4), 2) if pair not in _TEST_LAYOUTS),
    "test": _TEST_LAYOUTS,
}
"""Panels of the chart and of the document, counted in reading order."""


def make_infographic(
    rng: np.random.Generator,
    split: Split,
    size_hw: tuple[int, int] = (336, 336),
    *,
    text_panels: int = 2,
    draw_chart: Maker = make_chart,
) -> Page:
    """Draw a chart, a document and two panels of text.

    Args:
        rng: source of everything random; the same state gives the same page.
        split: decides typefaces, looks, values, and where the panels stand.
        size_hw: height and width of the page in pixels; a panel has half of each, at least 160.
        text_panels: how many of the panels of text are written, from the first on.
        draw_chart: draws the panel of the chart.

    Returns:
        The page, clean; its questions are about the chart and the document in turn, and its
        caption is that of the panels in reading order.
    """
    panel_hw = size_hw[0] // 2, size_hw[1] // 2
    layouts = LAYOUTS[looks_of(split)]
    chart_at, document_at = layouts[int(rng.integers(len(layouts)))]
    makers: list[Maker] = [make_text_page] * 4
    makers[chart_at], makers[document_at] = draw_chart, make_document
    for place in [at for at in range(4) if at not in (chart_at, document_at)][text_panels:]:
        makers[place] = _empty
    panels = [make(rng, split, panel_hw) for make in makers]
    chart, document = panels[chart_at], panels[document_at]
    image = Image.new("RGB", (2 * panel_hw[1], 2 * panel_hw[0]))
    glyphs: list[Glyph] = []
    for place, panel in enumerate(panels):
        left, top = place % 2 * panel_hw[1], place // 2 * panel_hw[0]
        image.paste(panel.image, (left, top))
        glyphs += [replace(glyph, x=glyph.x + left, y=glyph.y + top) for glyph in panel.glyphs]
    return Page(
        image=image,
        glyphs=glyphs,
        caption="\n".join(panel.caption for panel in panels if panel.caption),
        questions=_in_turn(chart.questions, document.questions),
        template=f"infographic/{chart_at}{document_at}/{document.template}",
        split=split,
        values_shown=chart.values_shown,
        facts=chart.facts,
    )


def _empty(rng: np.random.Generator, split: Split, size_hw: tuple[int, int]) -> Page:
    """A panel of plain white."""
    blank = Image.new("RGB", size_hw[::-1], "white")
    return Page(blank, glyphs=[], caption="", questions=[], template="empty", split=split)


def _in_turn(first: list[Question], second: list[Question]) -> list[Question]:
    """One of each in turn, until both are used up."""
    return [each for each in chain(*zip_longest(first, second)) if each is not None]
