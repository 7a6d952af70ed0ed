"""Compare finished runs: ``python -m proxyv.eval report RUN...``.

The scores are put together anew from the stored records: most from the score that a record holds,
which ``rescore`` brings up to date, some from its answer. Neither a model nor, but for the pictures
on the page, the data is needed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from proxyv.cli import CommandError, message_console, table_console
from proxyv.eval.compare import compare
from proxyv.eval.page import Pictures, render_page
from proxyv.eval.stored import load_run
from proxyv.eval.tables import FOOTNOTE, comparison_latex, comparison_markdown, comparison_table

__all__ = ["main"]

SAMPLES = 200


def build_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m proxyv.eval report",
        description="Compare runs: tables, intervals, paired tests, and a page with the samples.",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="result folder; the first is the base")
    add(
        "--output",
        type=Path,
        default=Path("runs", "report"),
        help="folder for report.html, report.md and report.tex (default: runs/report)",
    )
    add("--data", type=Path, help="where the pictures are (default: where the runs had them)")
    add(
        "--samples",
        type=int,
        default=SAMPLES,
        help=f"samples of a task on the page (default: {SAMPLES})",
    )
    add("--json", action="store_true", help="print the numbers as JSON instead of the tables")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    if args.samples < 0:
        raise CommandError(f"--samples {args.samples}: a whole number from 0 on is needed")
    warnings = message_console()
    runs = [load_run(folder) for folder in args.runs]
    comparison = compare(runs)
    places = {
        task: entry.get("data_folder")
        for run in reversed(runs)
        for task, entry in run.results["tasks"].items()
    }
    folders = {
        task: args.data or (Path(place) if place else None) for task, place in places.items()
    }
    page = render_page(comparison, runs, Pictures(folders, warnings.print), args.samples)
    texts = {
        "report.html": page,
        "report.md": comparison_markdown(comparison),
        "report.tex": comparison_latex(comparison),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (args.output / name).write_text(text, encoding="utf-8")
    if args.json:
        print(json.dumps(asdict(comparison), indent=1))
    else:
        console = table_console()
        console.print(comparison_table(comparison, comparison.rows, "scores"))
        if comparison.categories:
            console.print(comparison_table(comparison, comparison.categories, "parts of tasks"))
        console.print(FOOTNOTE, highlight=False)
    for note in comparison.notes:
        warnings.print(note)
    warnings.print(f"written: {', '.join(str(args.output / name) for name in texts)}")
    return 0
