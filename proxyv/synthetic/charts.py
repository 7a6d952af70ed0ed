"""Seeded charts with questions: bars, groups of bars, lines and pies, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from proxyv.synthetic.chart_canvas import Sheet
from proxyv.synthetic.chart_data import Chart, draw_chart, draw_plan
from proxyv.synthetic.chart_draw import draw
from proxyv.synthetic.chart_questions import KINDS, ask, caption
from proxyv.synthetic.chart_style import Style, draw_style
from proxyv.synthetic.page import Page, Question, Split
from proxyv.synthetic.words import Words

__all__ = ["chartqa_type", "compose_chart", "make_chart"]

MIN_SIDE_PX = 160
ATTEMPTS = 400
REASONING = ("extremum", "count", "compare", "colour", "arithmetic")
READING = ("lookup", "text")


def chartqa_type(question: Question) -> str:
    """ChartQA's ``type`` of a question: people asked for reasoning, machines for what is written.

    Raises:
        ValueError: a kind of question that charts do not have.
    """
    if question.kind in REASONING:
        return "human_test"
    if question.kind in READING:
        return "augmented_test"
    raise ValueError(
        f"question kind {question.kind!r} is not one of a chart's: {', '.join(REASONING + READING)}"
    )


def compose_chart(
    rng: np.random.Generator,
    split: Split,
    size_hw: tuple[int, int],
    small: bool = False,
    printed: bool = False,
) -> tuple[Chart, Style, Sheet]:
    """Draw content and look until every text fits on the page and none touches another.

    Kind, number of categories and whether values are printed are decided once, before, so that
    what fits easily is not more frequent.
    """
    if min(size_hw) < MIN_SIDE_PX:
        raise ValueError(
            f"size_hw {size_hw}: a chart needs at least {MIN_SIDE_PX} x {MIN_SIDE_PX} pixels"
        )
    words, plan = Words(rng, split), draw_plan(rng, small)
    while printed and not plan.values_shown:
        plan = draw_plan(rng, small)
    for _ in range(ATTEMPTS):
        style = draw_style(rng, split, size_hw)
        chart = draw_chart(plan, words, style, size_hw[1])
        if chart is None:
            continue
        ticks = not plan.values_shown or bool(rng.random() < 0.6)
        sheet = draw(chart, style, size_hw, ticks)
        if sheet.is_legible():
            return chart, style, sheet
    raise ValueError(f"size_hw {size_hw}: no chart of {plan} fits; take a larger page")


def make_chart(
    rng: np.random.Generator,
    split: Split,
    size_hw: tuple[int, int] = (168, 168),
    num_questions: tuple[int, int] = (3, 6),
    *,
    small: bool = False,
    kinds: Sequence[str] = KINDS,
    printed: bool = False,
) -> Page:
    """Draw a chart with a caption and questions; the same ``rng`` state gives the same page.

    Args:
        rng: source of randomness.
        split: the half of the small world; it decides words, fonts and looks.
        size_hw: height and width in pixels, 160 or more each.
        num_questions: fewest and most questions to ask.
        small: two or three categories and one series, to learn from first.
        kinds: of questions.
        printed: whether every chart prints its values.
    """
    chart, style, sheet = compose_chart(rng, split, size_hw, small, printed)
    fewest, most = num_questions
    questions = ask(chart, rng, int(rng.integers(fewest, most + 1)), kinds)
    return Page(
        image=sheet.render(),
        glyphs=sheet.glyphs(),
        caption=caption(chart),
        questions=questions,
        template=f"{chart.kind}/{style.title}/{style.legend}",
        split=split,
        values_shown=chart.plan.values_shown,
        facts={"title": chart.title, "theme": chart.theme},
    )
