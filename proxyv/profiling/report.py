"""One result in its forms: a table on the console and in Markdown, JSON, and a plot beside it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import textwrap
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.table import Table

from proxyv.cli import table_console
from proxyv.provenance import git_commit, hardware

__all__ = ["Plot", "Report"]


@dataclass(frozen=True)
class Plot:
    """What is drawn.

    Attributes:
        x: categories, or numbers.
        series: values by name, one for each x.
        y_label: with its unit.
        x_label: with its unit.
        lines: lines over numbers instead of bars beside each other.
        stacked: bars on top of each other.
        intervals: lower and upper end of each value, by name; series without any have no bars.
    """

    x: list[Any]
    series: dict[str, list[float]]
    y_label: str
    x_label: str = ""
    lines: bool = False
    stacked: bool = False
    intervals: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def error_bars(self, name: str) -> list[list[float]] | None:
        """How far the ends lie below and above the values; None where there are none."""
        if name not in self.intervals:
            return None
        pairs = list(zip(self.series[name], self.intervals[name], strict=True))
        below = [max(0.0, value - low) for value, (low, _) in pairs]
        return [below, [max(0.0, high - value) for value, (_, high) in pairs]]

    @property
    def lying(self) -> bool:
        """Whether bars lie: many names side by side could not be read."""
        return not self.lines and len(self.x) > 6

    def draw_bars(self, axes: Any) -> None:
        """Draw bars beside each other, or on top of each other, into matplotlib axes."""
        draw, ends, base = (
            (axes.barh, "xerr", "left") if self.lying else (axes.bar, "yerr", "bottom")
        )
        width = 0.8 if self.stacked else 0.8 / len(self.series)
        floor = [0.0] * len(self.x)
        for number, (name, values) in enumerate(self.series.items()):
            shift = 0.0 if self.stacked else (number - (len(self.series) - 1) / 2) * width
            places = [place + shift for place in range(len(self.x))]
            more = {ends: self.error_bars(name), base: floor}
            draw(places, values, width, label=name, capsize=3, **more)
            if self.stacked:
                floor = [low + value for low, value in zip(floor, values, strict=True)]
        names = [str(x) for x in self.x]
        if self.lying:
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()  # the first one on top
            axes.set(xlabel=self.y_label, ylabel=self.x_label)
        else:
            axes.set_xticks(range(len(names)), names)
            axes.set(xlabel=self.x_label, ylabel=self.y_label)


@dataclass(frozen=True)
class Report:
    """A result.

    Attributes:
        name: of the files.
        title: over table and plot.
        rows: one mapping of column to value each; floats as measured.
        notes: what the numbers mean.
        settings: what was asked for.
        plot: its picture.
    """

    name: str
    title: str
    rows: list[dict[str, Any]]
    notes: str
    plot: Plot
    settings: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with what the numbers depend on."""
        device = torch.device(self.settings.get("device") or "cpu")
        versions = {"python": platform.python_version()}
        versions |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        if device.type == "cuda":
            versions["CUDA"] = str(torch.version.cuda)
        return {
            "name": self.name,
            "title": self.title,
            "notes": self.notes,
            "settings": self.settings,
            "rows": self.rows,
            "plot": asdict(self.plot),
            "hardware": hardware(device),
            "versions": versions,
            "commit": git_commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "process_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }

    def print(self, as_json: bool) -> None:
        """Write to the console."""
        if as_json:
            print(json.dumps(self.as_dict(), indent=1))
            return
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE, pad_edge=False)
        columns = list(self.rows[0])
        for column in columns:
            text = isinstance(self.rows[0][column], str)
            side: Literal["left", "right"] = "left" if text else "right"
            # Names may take two lines, numbers not.
            table.add_column(column, justify=side, no_wrap=not text, overflow="fold")
        for row in self.rows:
            table.add_row(*[_cell(row[column]) for column in columns])
        console = table_console()
        console.print(table)
        console.print(self.notes, style="dim", highlight=False)

    def save(self, folder: Path) -> None:
        """Write ``NAME.json``, ``NAME.md`` and ``NAME.png``; the JSON file last."""
        folder.mkdir(parents=True, exist_ok=True)
        found = self.as_dict()
        self._draw(folder / f"{self.name}.png")
        (folder / f"{self.name}.md").write_text(self._markdown(found))
        (folder / f"{self.name}.json").write_text(json.dumps(found, indent=1) + "\n")

    def _markdown(self, found: dict[str, Any]) -> str:
        columns = list(self.rows[0])
        lines = [columns, ["---"] * len(columns)]
        lines += [[_cell(row[column]) for column in columns] for row in self.rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        hardware, versions = found["hardware"], found["versions"]
        made = [
            found["date"],
            f"{hardware['device']}, {hardware['cpu_count']} cores, "
            f"{hardware['torch_threads']} threads",
            *(f"{name} {version}" for name, version in versions.items()),
            f"seed {self.settings['seed']}" if "seed" in self.settings else "no random numbers",
            f"commit {found['commit']}",
        ]
        return (
            f"# {self.title}\n\n{table}\n\n{self.notes}\n\n{'; '.join(made)}.\n\n"
            f"![{self.title}]({self.name}.png)\n"
        )

    def _draw(self, file: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        plot = self.plot
        across = 0.7 * len(plot.x) + 3
        figure = Figure(figsize=(9, 0.4 * across) if plot.lying else (max(6.0, across), 4))
        figure.set_layout_engine("constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if plot.lines:
            for name, values in plot.series.items():
                bars = plot.error_bars(name)
                axes.errorbar(plot.x, values, yerr=bars, marker="o", capsize=3, label=name)
            axes.set_xticks(plot.x)
            axes.set(xlabel=plot.x_label, ylabel=plot.y_label, ylim=(0, None))
        else:
            plot.draw_bars(axes)
        title = textwrap.fill(self.title, int(12 * figure.get_figwidth()))
        figure.suptitle(title, fontsize="large")
        figure.legend(fontsize="small", loc="outside right center")
        figure.savefig(file, dpi=120)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
