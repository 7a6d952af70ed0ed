"""What a chart shows: its kind, names and numbers, drawn so that no answer can be guessed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from proxyv.synthetic.chart_canvas import Face
from proxyv.synthetic.chart_style import Style
from proxyv.synthetic.page import Split
from proxyv.synthetic.words import MONTHS, Words, split_of

__all__ = ["Chart", "Kind", "NumberFormat", "Plan", "draw_chart", "draw_plan"]

Kind = Literal["bar", "hbar", "grouped", "line", "pie"]
KINDS: tuple[Kind, ...] = ("bar", "hbar", "grouped", "line", "pie")
KIND_SHARES = (0.29, 0.23, 0.12, 0.20, 0.16)
SIZE_SHARES = (0.27, 0.28, 0.27, 0.18)  # of 2, 3, 4 and 5 categories
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MEASURES = (
    "sales", "prices", "exports", "imports", "output", "costs", "users", "orders", "scores",
    "demand", "stock", "visits", "profit", "budget", "votes", "growth",
)  # fmt: skip
MAX_NAME = 8


@dataclass(frozen=True)
class NumberFormat:
    """How numbers are printed."""

    decimals: int = 0
    percent: bool = False

    def __call__(self, value: float, *, short: bool = False) -> str:
        """The number as text; ``short`` drops the decimals of a whole number (axis ticks)."""
        decimals = 0 if short and float(value).is_integer() else self.decimals
        return f"{value:.{decimals}f}" + ("%" if self.percent else "")


@dataclass(frozen=True)
class Plan:
    """What is decided before anything must fit on the page, so that fitting cannot skew it."""

    kind: Kind
    num_categories: int
    num_series: int
    values_shown: bool


@dataclass(frozen=True)
class Chart:
    """The content of a chart.

    Attributes:
        values: one row per series, one number per category.
        number: how the numbers are printed.
        step: distance of the axis ticks (0 for a pie).
        num_ticks: ticks above zero.
        colors: (name, hex) per category if ``vary_colors``, else per series.
        x_name: what is written below the horizontal axis, or empty.
        y_name: what is written above the vertical axis, or empty.
        theme: what the categories are ("year", "name", ...).
    """

    plan: Plan
    title: str
    categories: tuple[str, ...]
    series: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    number: NumberFormat
    step: float
    num_ticks: int
    colors: tuple[tuple[str, str], ...]
    vary_colors: bool
    x_name: str
    y_name: str
    theme: str

    @property
    def kind(self) -> Kind:
        """The kind of chart."""
        return self.plan.kind

    @property
    def ticks(self) -> list[float]:
        """Values of the axis ticks, zero first."""
        return [self.step * i for i in range(self.num_ticks + 1)]

    def printed(self, series: int, category: int) -> str:
        """A value as it is, or would be, printed."""
        return self.number(self.values[series][category], short=not self.plan.values_shown)


def draw_plan(rng: np.random.Generator, small: bool = False) -> Plan:
    """Draw kind, size and whether values are printed; a small chart is one of few things."""
    if small:
        kinds: tuple[Kind, ...] = ("bar", "hbar", "line", "pie")
        kind = kinds[int(rng.choice(4, p=(0.4, 0.25, 0.2, 0.15)))]
        num_categories = 3 if kind == "pie" else int(rng.integers(2, 4))
        return Plan(kind, num_categories, 1, bool(rng.random() < 0.75))
    kind = KINDS[int(rng.choice(len(KINDS), p=KIND_SHARES))]
    # Few things: 144 patches and a language model of 5 M parameters shall be able to read them.
    num_categories, num_series, shown = int(rng.choice((2, 3, 4, 5), p=SIZE_SHARES)), 1, 0.57
    if kind == "grouped":
        num_categories, num_series, shown = int(rng.integers(2, 4)), 2, 0.3
    elif kind == "line":
        num_series = 1 if rng.random() < 0.7 else 2
        shown = 0.57 if num_series == 1 else 0.0
    return Plan(kind, num_categories, num_series, bool(rng.random() < shown))


def _is_name(word: str) -> bool:
    """Whether a word may name something: the calendar's words have their own split."""
    return len(word) > 2 and word not in MONTHS and word not in WEEKDAYS


def _draw_until(make: Callable[[], str], accept: Callable[[str], bool], tries: int) -> str | None:
    for _ in range(tries):
        value = make()
        if accept(value):
            return value
    return None


def draw_names(
    words: Words, theme: str, count: int, face: Face, max_px: float
) -> tuple[str, ...] | None:
    """Different names of a theme that are no wider than asked; None if none were found."""
    rng = words.rng
    if theme == "year":
        years = [str(y) for y in range(1960, 2031) if split_of(str(y)) == words.split]
        stride = int(rng.integers(1, 3))
        first = int(rng.integers(len(years) - stride * (count - 1)))
        names = tuple(years[first + stride * i] for i in range(count))
        return names if face.width(names[0]) <= max_px else None
    if theme == "calendar":
        cycle = MONTHS if words.split == "train" else WEEKDAYS
        first = int(rng.integers(len(cycle)))
        names = tuple(cycle[(first + i) % len(cycle)] for i in range(count))
        return names if max(face.width(name) for name in names) <= max_px else None
    makers = {
        "name": lambda: words.first_name(MAX_NAME),
        "family": lambda: words.last_name(MAX_NAME),
        "town": lambda: words.city(MAX_NAME + 1),
        "product": lambda: words.noun(MAX_NAME),
    }
    found: list[str] = []
    for _ in range(count):
        name = _draw_until(
            makers[theme],
            lambda word: _is_name(word) and word not in found and face.rough_width(word) <= max_px,
            tries=150,
        )
        if name is None:
            return None
        found.append(name)
    return tuple(found)


def _draw_axis(
    rng: np.random.Generator, plan: Plan, split: Split
) -> tuple[NumberFormat, float, int, tuple[tuple[float, ...], ...]]:
    """Draw number format, tick step, number of ticks and values."""
    style = int(rng.choice(4, p=(0.45, 0.25, 0.15, 0.15)))
    number = (NumberFormat(), NumberFormat(), NumberFormat(decimals=1), NumberFormat(0, True))[
        style
    ]
    steps = ((2.0, 10.0, 20.0), (50.0, 100.0, 200.0), (1.0, 2.0, 5.0, 10.0), (10.0, 20.0))[style]
    step = float(steps[int(rng.integers(len(steps)))])
    num_ticks = int(rng.integers(4, 6))
    # Without printed values every value lies on a grid line: half of the distance between two is
    # less than a patch.
    grain = 10.0**-number.decimals if plan.values_shown else step
    low = max(1, round(0.12 * step * num_ticks / grain))
    if style == 1 and plan.values_shown:
        low = 100  # three digits are wanted
    high = round(step * num_ticks / grain)

    def value() -> float:
        while True:
            drawn = round(float(rng.integers(low, high + 1)) * grain, 1)
            text = number(drawn).rstrip("%")
            if not plan.values_shown or len(text) < 3 or split_of(text) == split:
                return drawn

    def row() -> tuple[float, ...]:
        while True:
            values = [value() for _ in range(plan.num_categories)]
            ordered = sorted(values)
            apart = min(ordered[1] - ordered[0], ordered[-1] - ordered[-2])
            if apart >= 0.04 * step * num_ticks:  # the highest and the lowest stand out
                return tuple(values)

    while True:
        rows = tuple(row() for _ in range(plan.num_series))
        # Lines must not run through each other's points.
        if plan.kind != "line" or all(
            len({*column}) == len(rows) for column in zip(*rows, strict=True)
        ):
            return number, step, num_ticks, rows


def _draw_shares(rng: np.random.Generator, plan: Plan) -> tuple[float, ...]:
    """Whole per cents that make 100, the largest and the smallest clearly so."""
    apart = 3 if plan.values_shown else 5
    while True:
        parts = rng.dirichlet([3.0] * plan.num_categories) * 100
        shares = np.floor(parts).astype(int)
        shares[int(rng.integers(plan.num_categories))] += 100 - int(shares.sum())
        ordered = np.sort(shares)
        if ordered[0] >= 7 and min(ordered[1] - ordered[0], ordered[-1] - ordered[-2]) >= apart:
            return tuple(float(share) for share in shares)


def _draw_title(words: Words, style: Style, max_px: float) -> str | None:
    def make() -> str:
        parts = [words.noun(MAX_NAME), words.pick(MEASURES)]
        if words.rng.random() < 0.3:
            parts += ["in", str(int(words.rng.integers(1960, 2031)))]
        return " ".join(parts)

    return _draw_until(
        make,
        lambda text: split_of(text) == words.split and style.title_face.rough_width(text) <= max_px,
        tries=100,
    )


def _draw_axis_name(words: Words) -> str:
    name = _draw_until(lambda: words.noun(MAX_NAME), _is_name, tries=100)
    if name is None:
        raise ValueError(f"split {words.split!r}: no noun of 3 to {MAX_NAME} characters")
    return name


def _name_px(plan: Plan, style: Style, width: int) -> tuple[float, float]:
    """The widest category name and the widest series name that can stand on the page."""
    side = 0.3 * width if plan.num_series > 1 and style.legend == "right" else 0.0
    if plan.kind in ("hbar", "pie"):
        category = 0.27 * width
    else:
        category = (width - side - 4 * style.face.em) / plan.num_categories - 2
    gap = 2.2 * style.small.em
    series = (side if side else (width - 6) / plan.num_series) - gap
    return category, series


def draw_chart(plan: Plan, words: Words, style: Style, width: int) -> Chart | None:
    """Draw the content of a chart that follows a plan; None if no names fit this style."""
    rng = words.rng
    category_px, series_px = _name_px(plan, style, width)
    timed = rng.random() < (0.7 if plan.kind == "line" else 0.2) and plan.kind != "pie"
    themes = ("year", "calendar") if timed else ("name", "family", "town", "product")
    theme = words.pick(themes)
    categories = draw_names(words, theme, plan.num_categories, style.face, category_px)
    series: tuple[str, ...] | None = ("",)
    if plan.num_series > 1:
        others = [t for t in ("name", "family", "product") if t != theme]
        series = draw_names(words, words.pick(others), plan.num_series, style.small, series_px)
    title = _draw_title(words, style, width - 8)
    if categories is None or series is None or title is None or set(categories) & set(series):
        return None
    if plan.kind == "pie":
        number, step, num_ticks = NumberFormat(0, True), 0.0, 0
        values: tuple[tuple[float, ...], ...] = (_draw_shares(rng, plan),)
    else:
        number, step, num_ticks, values = _draw_axis(rng, plan, words.split)
    vary = plan.kind == "pie" or (plan.kind in ("bar", "hbar") and rng.random() < 0.4)
    named = plan.kind != "pie"
    return Chart(
        plan=plan,
        title=title,
        categories=categories,
        series=series,
        values=values,
        number=number,
        step=step,
        num_ticks=num_ticks,
        colors=style.colors[: plan.num_categories if vary else plan.num_series],
        vary_colors=vary,
        x_name=_draw_axis_name(words) if named and rng.random() < 0.3 else "",
        y_name=_draw_axis_name(words) if named and rng.random() < 0.2 else "",
        theme=theme,
    )
