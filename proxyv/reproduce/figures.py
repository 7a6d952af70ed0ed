"""The report's figures: score against FLOPs (figure 1), and the redundancy curve (figure 2)."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Point", "Share", "draw_curve", "draw_scores"]


class Point(NamedTuple):
    """An arm: FLOPs in percent of the baseline's, score in percent with the interval of its gap."""

    title: str
    trained: bool
    flops: float
    score: float
    low: float
    high: float


class Share(NamedTuple):
    """A share of the layers, and a score with its interval in percent of the baseline's."""

    share: float
    score: float
    low: float
    high: float


def draw_scores(path: Path, title: str, points: Sequence[Point]) -> None:
    """Score against FLOPs, one mark for each arm; the same points give the same file.

    Arms lie too close for their names: each is a letter, and the key has them from the best down.
    Marks of arms that were not trained are hollow.
    """
    figure, axes = _figure(width=9)
    for number, point in enumerate(sorted(points, key=lambda point: -point.score)):
        bars = [[max(0.0, point.score - point.low)], [max(0.0, point.high - point.score)]]
        marker, side = ("*", 9) if point.title.startswith("ProxyV") else ("o", -9)
        letter = string.ascii_letters[number % len(string.ascii_letters)]
        axes.errorbar(
            [point.flops],
            [point.score],
            yerr=bars,
            marker=marker,
            fillstyle="full" if point.trained else "none",
            linestyle="none",
            capsize=3,
            label=f"{letter}  {point.title}",
        )
        axes.annotate(
            letter,
            (point.flops, point.score),
            textcoords="offset points",
            xytext=(side, 0),
            ha="center",
            va="center",
            fontsize="small",
        )
    axes.set(
        title=title,
        xlabel="prefill FLOPs, % of the baseline",
        ylabel="score, % (baseline's + gap to it)",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    _save(figure, path)


def draw_curve(path: Path, title: str, lines: Mapping[str, Sequence[Share]]) -> None:
    """Score against the share of layers, one line for each name; the first one is the curve."""
    figure, axes = _figure()
    for number, (name, points) in enumerate(lines.items()):
        shares, scores, low, high = zip(*points, strict=True) if points else ((),) * 4
        bars = [
            [max(0.0, score - end) for score, end in zip(scores, low, strict=True)],
            [max(0.0, end - score) for score, end in zip(scores, high, strict=True)],
        ]
        style = ("o-", "*-", "s")[number % 3]  # of the paper's points no shape is known
        axes.errorbar(shares, scores, yerr=bars, fmt=style, capsize=3, label=name)
    axes.set(title=title, xlabel="share of layers, from the last one", ylabel="% of the baseline")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    _save(figure, path)


def _figure(width: float = 7) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
