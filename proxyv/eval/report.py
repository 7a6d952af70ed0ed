"""Scores with their uncertainty, and the table that is printed at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from rich import box
from rich.table import Table

__all__ = ["bootstrap_interval", "results_table"]


def bootstrap_interval(
    scores: Sequence[float], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean, over samples drawn with replacement.

    It covers the choice of questions only, not the seed of training.

    Args:
        scores: one score for each sample, at least one.
        level: share of the means that lie inside.
        draws: number of resampled means.
        seed: seed of the drawing; the same scores give the same interval.

    Returns:
        The lower and the upper end.
    """
    if not len(scores):
        raise ValueError("an interval needs at least one score, got none")
    values = np.asarray(scores, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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
                _number(entry["value"], high),
                f"{_number(low, high)} .. {_number(high, high)}",
                str(entry["samples"]),
                "" if position else str(task["failed"]),
            )
    for group, value in results.get("averages", {}).items():
        table.add_row(group, "average x 100", f"{value:.2f}", "", "", "")
    return table


def _number(value: float, largest: float) -> str:
    return f"{value:.4f}" if largest <= 1 else f"{value:.2f}"
