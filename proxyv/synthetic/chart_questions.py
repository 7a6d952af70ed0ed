"""Questions about a chart, in the manner of ChartQA, and a caption that says what is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from proxyv.synthetic.chart_data import Chart
from proxyv.synthetic.page import Question
from proxyv.synthetic.words import MONTHS

__all__ = ["KINDS", "ask", "caption"]

MAX_CAPTION = 150
ATTEMPTS_PER_QUESTION = 50  # a chart of three bars does not have many different questions
KIND_NAMES = {
    "bar": "Bar chart",
    "hbar": "Horizontal bar chart",
    "grouped": "Grouped bar chart",
    "line": "Line chart",
    "pie": "Pie chart",
}
# How often each kind of question is asked, where the chart allows it.
SHARES = {
    "lookup": 0.36,
    "extremum": 0.20,
    "compare": 0.10,
    "count": 0.08,
    "colour": 0.12,
    "text": 0.10,
    "arithmetic": 0.04,
}
KINDS = tuple(SHARES)


def caption(chart: Chart) -> str:
    """What is drawn, in words: kind, title, then the values by category (or series)."""
    start = f'{KIND_NAMES[chart.kind]} "{chart.title}".'
    rows = []
    for j, name in enumerate(chart.series):
        items = (f"{cat} {chart.printed(j, i)}" for i, cat in enumerate(chart.categories))
        rows.append((f"{name}: " if name else "") + ", ".join(items) + ".")
    full = " ".join([start, *rows])
    if len(full) <= MAX_CAPTION:
        return full
    names = f"{', '.join(chart.categories)}."
    return f"{start} {', '.join(chart.series)}: {names}" if chart.series[0] else f"{start} {names}"


class _Asker:
    """Makes one question of a kind at a time; None where the chart does not allow it."""

    def __init__(self, chart: Chart, rng: np.random.Generator) -> None:
        self.chart = chart
        self.rng = rng
        self.values = np.asarray(chart.values)
        self.thing, self.dated = _thing(chart)
        self.readable = chart.plan.values_shown or chart.kind != "pie"

    def _pick(self, count: int) -> int:
        return int(self.rng.integers(count))

    def _one(self, options: Sequence[str]) -> str:
        return options[self._pick(len(options))]

    def _place(self) -> tuple[int, str]:
        """A series, and how it is named behind a question ("" where there is only one)."""
        series = self._pick(len(self.chart.series))
        name = self.chart.series[series]
        return series, f" for {name}" if name else ""

    def _number(self, value: float) -> tuple[str, ...]:
        text = self.chart.number(value, short=not self.chart.plan.values_shown)
        plain = self.chart.number(value, short=True)
        return tuple(dict.fromkeys((text, plain, plain.rstrip("%"))))

    def lookup(self) -> Question | None:
        """The value of a category, or the category of a value."""
        if not self.readable:
            return None
        chart = self.chart
        series, behind = self._place()
        row = self.values[series]
        i = self._pick(len(row))
        if self.rng.random() < 0.2 and int((row == row[i]).sum()) == 1:
            value = self._number(row[i])[0]
            options = (
                f"Which {self.thing} has the value {value}",
                f"Which {self.thing} has a value of {value}",
            )
            return Question(f"{self._one(options)}{behind}?", (chart.categories[i],), "lookup")
        name = chart.categories[i]
        options = (
            (f"What is the value in {name}", f"What was the value in {name}")
            if self.dated
            else (f"What is the value of {name}", f"What value does {name} have")
        )
        return Question(f"{self._one(options)}{behind}?", self._number(row[i]), "lookup")

    def extremum(self) -> Question | None:
        """The highest or lowest category, series or value."""
        chart = self.chart
        high = bool(self.rng.random() < 0.5)
        word = self._one(("highest", "largest", "greatest") if high else ("lowest", "smallest"))
        if len(chart.series) > 1 and self.rng.random() < 0.4:
            i = self._pick(len(chart.categories))
            column = self.values[:, i]
            best = column.max() if high else column.min()
            if int((column == best).sum()) != 1:
                return None
            answer = chart.series[int(np.flatnonzero(column == best)[0])]
            text = f"Which series has the {word} value in {chart.categories[i]}?"
            return Question(text, (answer,), "extremum")
        series, behind = self._place()
        row = self.values[series]
        i = int(row.argmax() if high else row.argmin())
        if chart.theme == "year" or (self.readable and self.rng.random() < 0.25):
            return Question(f"What is the {word} value{behind}?", self._number(row[i]), "extremum")
        options = [f"Which {self.thing} has the {word} value"]
        if self.dated:
            options.append(f"In which {self.thing} is the value {word}")
        return Question(f"{self._one(options)}{behind}?", (chart.categories[i],), "extremum")

    def compare(self) -> Question | None:
        """Whether one category is above another; as often yes as no."""
        series, behind = self._place()
        row = self.values[series]
        i, j = (int(k) for k in self.rng.permutation(len(row))[:2])
        span = self.chart.step * self.chart.num_ticks or 100.0
        if abs(row[i] - row[j]) < 0.04 * span:
            return None
        more, yes = bool(self.rng.random() < 0.5), bool(self.rng.random() < 0.5)
        if (row[i] > row[j]) != (more == yes):
            i, j = j, i
        word = self._one(("greater", "higher", "larger") if more else ("less", "lower", "smaller"))
        first, second = self.chart.categories[i], self.chart.categories[j]
        of = "in" if self.dated else "of"
        options: tuple[str, ...] = (f"Is the value {of} {first} {word} than {of} {second}",)
        if not self.dated:
            options += (f"Is {first} {word} than {second}",)
        return Question(f"{self._one(options)}{behind}?", ("Yes" if yes else "No",), "compare")

    def count(self) -> Question | None:
        """How many categories there are."""
        options = {
            "bar": ("How many bars are there?", "How many categories are shown?"),
            "hbar": ("How many bars are there?", "How many categories are shown?"),
            "grouped": ("How many groups of bars are there?",),
            "line": ("How many points does each line have?",),
            "pie": ("How many slices are there?", "How many categories are shown?"),
        }[self.chart.kind]
        return Question(self._one(options), (str(len(self.chart.categories)),), "count")

    def colour(self) -> Question | None:
        """The colour of a named thing, or the thing of a named colour."""
        chart = self.chart
        what = {"pie": "slice", "line": "line"}.get(chart.kind, "bar")
        if len(chart.colors) == 1:
            color = chart.colors[0][0]
            text = "What color is the line?" if what == "line" else "What color are the bars?"
            return Question(text, _color_answers(color), "colour")
        names = chart.categories if chart.vary_colors else chart.series
        i = self._pick(len(names))
        color = chart.colors[i][0]
        if self.rng.random() < 0.5:
            options = (f"What color is {names[i]}?", f"Which color represents {names[i]}?")
            return Question(self._one(options), _color_answers(color), "colour")
        thing = self.thing if chart.vary_colors else "series"
        options = (f"Which {thing} is {color}?", f"What does the {color} {what} show?")
        return Question(self._one(options), (names[i],), "colour")

    def text(self) -> Question | None:
        """The title, the name of an axis, or a category by its place."""
        chart = self.chart
        choices: list[tuple[str, str]] = [
            (
                self._one(("What is the title of the chart?", "What is the chart about?")),
                chart.title,
            )
        ]
        if chart.x_name:
            choices.append(("What is the name of the horizontal axis?", chart.x_name))
        if chart.y_name:
            choices.append(("What is the name of the vertical axis?", chart.y_name))
        if chart.kind != "pie":
            first, last = ("top", "bottom") if chart.kind == "hbar" else ("left", "right")
            places = ((f"first from the {first}", 0), (f"first from the {last}", -1))
            place, i = places[self._pick(2)]
            choices.append((f"Which {self.thing} is the {place}?", chart.categories[i]))
        question, answer = choices[self._pick(len(choices))]
        return Question(question, (answer,), "text")

    def arithmetic(self) -> Question | None:
        """The sum or the difference of two values."""
        if not self.readable:
            return None
        series, behind = self._place()
        row = self.values[series]
        i, j = (int(k) for k in self.rng.permutation(len(row))[:2])
        first, second = self.chart.categories[i], self.chart.categories[j]
        if self.rng.random() < 0.5 or row[i] == row[j]:
            text, value = f"What is the sum of {first} and {second}", row[i] + row[j]
        else:
            text = f"What is the difference between {first} and {second}"
            value = abs(row[i] - row[j])
        return Question(f"{text}{behind}?", self._number(round(float(value), 1)), "arithmetic")


def _thing(chart: Chart) -> tuple[str, bool]:
    """What a category is called in questions, and whether it is a time."""
    if chart.theme == "year":
        return "year", True
    if chart.theme == "calendar":
        return ("month" if chart.categories[0] in MONTHS else "day"), True
    return "category", False


def _color_answers(color: str) -> tuple[str, ...]:
    return (color, "grey") if color == "gray" else (color,)


def _gist(chart: Chart, question: Question) -> tuple[str, str, frozenset[str]]:
    """What two questions share that ask the same in other words."""
    names = frozenset(n for n in (*chart.categories, *chart.series) if n and n in question.text)
    answer = "" if question.kind == "compare" else question.answers[0]
    return question.kind, answer, names


def _is_year(chart: Chart, question: Question) -> bool:
    """Whether a year is the answer: relaxed accuracy would take any other year for it."""
    return chart.theme == "year" and question.answers[0] in chart.categories


def ask(
    chart: Chart, rng: np.random.Generator, count: int, kinds: Sequence[str] = KINDS
) -> list[Question]:
    """Draw different questions of some kinds: ``count`` of them, or as many as can be found."""
    asker = _Asker(chart, rng)
    makers: dict[str, Callable[[], Question | None]] = {
        kind: getattr(asker, kind) for kind in kinds
    }
    shares = np.asarray([SHARES[kind] for kind in kinds])
    found: dict[tuple[str, str, frozenset[str]], Question] = {}
    for _ in range(ATTEMPTS_PER_QUESTION * count):
        if len(found) == count:
            break
        question = makers[kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]]()
        if question is not None and not _is_year(chart, question):
            found.setdefault(_gist(chart, question), question)
    return list(found.values())
