"""The report's figures: score against FLOPs (figure 1), and the redundancy curve (figure 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Point", "draw_curve", "draw_scores"]


class Point(NamedTuple):
    """An arm: FLOPs in percent of the baseline's, score with its interval in percent."""

    title: str
    flops: float
    score: float
    low: float
    high: float


def draw_scores(path: Path, title: str, points: Sequence[Point]) -> None:
    """Score against FLOPs, one mark for each arm; the same points give the same file."""
    figure, axes = _figure()
    for point in points:
        bars = [[max(0.0, point.score - point.low)], [max(0.0, point.high - point.score)]]
        marker = "*" if point.title.startswith("ProxyV") else "o"
        axes.errorbar([point.flops], [point.score], yerr=bars, marker=marker, capsize=3)
        axes.annotate(
            point.title,
            (point.flops, point.score),
            textcoords="offset points",
            xytext=(6, 4),
            fontsize="x-small",
        )
    axes.set(title=title, xlabel="prefill FLOPs, % of the baseline", ylabel="score, %")
    axes.margins(x=0.15)  # for the names beside the points
    axes.grid(alpha=0.3)
    _save(figure, path)


def draw_curve(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Score against the share of layers whose vision attention is masked."""
    figure, axes = _figure()
    scores = [row["score %"] for row in rows]
    bars = [
        [max(0.0, row["score %"] - row["from"]) for row in rows],
        [max(0.0, row["to"] - row["score %"]) for row in rows],
    ]
    axes.errorbar([row["ratio"] for row in rows], scores, yerr=bars, marker="o", capsize=3)
    axes.set(title=title, xlabel="share of layers masked, from the last one", ylabel="score, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    _save(figure, path)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
