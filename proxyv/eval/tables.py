"""Tables of scores: one run on the console; runs side by side there, in Markdown and in LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rich import box
from rich.markup import escape
from rich.table import Table

from proxyv.eval.compare import Cell, Comparison, Row
from proxyv.eval.statistics import Difference

__all__ = [
    "comparison_latex",
    "comparison_markdown",
    "comparison_table",
    "format_score",
    "results_table",
]

SIGNIFICANT = 0.05


def results_table(results: Mapping[str, Any]) -> Table:
    """The table of one run, from the content of its ``results.json``.

    Scores are 0 to 1 with four digits, others (MME, MMBench, averages of tasks) with two.
    """
    control = results["settings"]["control"]
    title = f"{results['model']}" + (f", control: {control}" if control else "")
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    for heading in ("task", "score", "value", "95 % interval", "samples", "failed"):
        numeric = heading not in ("task", "score")
        justify: Literal["left", "right"] = "right" if numeric else "left"
        table.add_column(heading, justify=justify, no_wrap=heading != "score")
    for name, task in results["tasks"].items():
        if not task["scores"]:
            counts = (str(task["samples"]), str(task["failed"]))
            table.add_row(name, "for the test server", "", "", *counts)
        for position, (score, entry) in enumerate(task["scores"].items()):
            low, high = entry["interval"]
            table.add_row(
                "" if position else name,
                score,
                format_score(entry["value"], high),
                f"{format_score(low, high)} .. {format_score(high, high)}",
                str(entry["samples"]),
                "" if position else str(task["failed"]),
            )
    for group, value in results.get("averages", {}).items():
        table.add_row(group, "average x 100", f"{value:.2f}", "", "", "")
    return table


def format_score(value: float, largest: float) -> str:
    """Four digits for scores from 0 to 1, two for others; ``largest`` tells which it is."""
    return f"{value:.4f}" if largest <= 1 else f"{value:.2f}"


def comparison_table(comparison: Comparison, rows: Sequence[Row], title: str) -> Table:
    """Runs side by side on the console."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    words = [word for row in rows for word in row.score.split()]
    for place, heading in enumerate(_headings(comparison)):
        table.add_column(
            escape(heading),
            justify="left" if place < 2 else "right",
            overflow="fold",
            min_width=max(map(len, words), default=0) if place == 1 else None,
        )
    for cells in _lines(rows, escape, lambda text: f"[bold]{text}[/bold]"):
        table.add_row(*cells)
    return table


def comparison_markdown(comparison: Comparison) -> str:
    """Runs side by side in Markdown, the best value in bold; parts of tasks in a second table."""

    def plain(text: str) -> str:
        return text.replace("|", "\\|").replace("*", "\\*")

    def table(rows: Sequence[Row]) -> list[str]:
        headings = list(map(plain, _headings(comparison)))
        rule = ["---", "---", *["---:"] * (len(headings) - 2)]
        lines = _lines(rows, plain, lambda text: f"**{text}**")
        return [f"| {' | '.join(cells)} |" for cells in [headings, rule, *lines]]

    blocks = [table(comparison.rows)]
    blocks += [table(comparison.categories)] if comparison.categories else []
    blocks.append([FOOTNOTE, *(f"- {note}" for note in comparison.notes)])
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def comparison_latex(comparison: Comparison) -> str:
    """Runs side by side as a LaTeX ``tabular`` (package ``booktabs``), the best value in bold."""
    marks = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    marks |= {mark: "\\" + mark for mark in "&%$#_{}"}

    def plain(text: str) -> str:
        return "".join(marks.get(char, char) for char in text)

    headings = list(map(plain, _headings(comparison)))
    lines = [
        "% " + FOOTNOTE,
        r"\begin{tabular}{ll" + "r" * (len(headings) - 2) + "}",
        r"\toprule",
        " & ".join(headings) + r" \\",
    ]
    for rows in filter(None, (comparison.rows, comparison.categories)):
        lines.append(r"\midrule")
        body = _lines(rows, plain, lambda text: rf"\textbf{{{text}}}")
        lines += [" & ".join(cells) + r" \\" for cells in body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


FOOTNOTE = (
    "Each value with its 95 % bootstrap interval over questions; differences are from the first "
    "run, p from a paired permutation test (* below 0.05)."
)


def _headings(comparison: Comparison) -> list[str]:
    names = comparison.names
    return ["task", "score", *names, *(f"{name} - {names[0]}" for name in names[1:])]


def _lines(
    rows: Sequence[Row], plain: Callable[[str], str], bold: Callable[[str], str]
) -> list[list[str]]:
    """The cells of each row as text; the name of a task stands once."""
    lines, task = [], None
    for row in rows:
        score = row.score + (" (lower is better)" if row.lower_is_better else "")
        cells = [_cell(cell, row) for cell in row.cells]
        best = [cell is not None and cell.value == row.best for cell in row.cells]
        cells = [
            bold(plain(text)) if good else plain(text)
            for text, good in zip(cells, best, strict=True)
        ]
        gaps = [plain(_gap(difference, row)) for difference in row.differences]
        lines.append(["" if row.task == task else plain(row.task), plain(score), *cells, *gaps])
        task = row.task
    return lines


def _cell(cell: Cell | None, row: Row) -> str:
    if cell is None:
        return "-"
    low, high = (format_score(end, row.largest) for end in cell.interval)
    return f"{format_score(cell.value, row.largest)} ({low} to {high})"


def _gap(difference: Difference | None, row: Row) -> str:
    if difference is None:
        return "-"
    value = format_score(difference.value, row.largest)
    sign = "" if value.startswith("-") else "+"
    star = "*" if difference.p_value < SIGNIFICANT else ""
    return f"{sign}{value} (p {difference.p_value:.4f}){star}"
