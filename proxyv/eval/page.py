"""One HTML page that shows runs side by side: scores, plots, and the samples with their images.

The page needs no other file and no network: styles, script and pictures are inside. Answers of
models are put into it as data and shown as text, whatever they contain.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from proxyv.cli import CommandError
from proxyv.data.images import ImageRef
from proxyv.eval.benchmarks import BENCHMARKS, Record
from proxyv.eval.compare import Comparison, Row
from proxyv.eval.images import row_images
from proxyv.eval.plan import hash_file, hash_shown
from proxyv.eval.sources import Rows, load_rows
from proxyv.eval.stored import StoredRun
from proxyv.eval.tables import FOOTNOTE, format_score
from proxyv.provenance import short_commit

__all__ = ["Pictures", "choose_samples", "render_page"]

MAX_SIDE_PX = 640
COLOURS = ("#2563eb", "#d97706", "#059669", "#be185d", "#7c3aed", "#475569")


class Pictures:
    """Pictures of samples, each kept once, as small JPEG files in the page.

    Args:
        folders: folder of ``--data`` for each task; None for the hub.
        warn: takes one line where pictures cannot be had.
    """

    def __init__(self, folders: Mapping[str, Path | None], warn: Callable[[str], None]) -> None:
        self.folders, self.warn = folders, warn
        self.found: dict[str, str] = {}
        self._rows: dict[str, Rows | None] = {}
        self._warned: set[str] = set()

    def keys(self, task: str, index: int, image_hash: str | None) -> list[str]:
        """The pictures of a row, the question's own; none where they cannot be had.

        Args:
            task: the benchmark.
            index: the row.
            image_hash: of a record that was asked about these images; None where there is none.
        """
        rows = self._table(task)
        if rows is None:
            return []
        if index >= len(rows):
            return self._other(task, f"{rows.origin} has {len(rows)} rows, row {index} was asked")
        keys = []
        try:
            images = row_images(BENCHMARKS[task], rows, index)
            hashes = [hash_file(image) for image in images]
            if image_hash not in (None, hash_shown(hashes)):
                return self._other(task, f"row {index} of {rows.origin} has another image now")
            for image, name in zip(images, hashes, strict=True):
                key = name[:16]
                if key not in self.found:
                    self.found[key] = _data_uri(image)
                keys.append(key)
        except ValueError:
            return []  # the sample failed for the same reason, which its record tells
        return keys

    def _other(self, task: str, why: str) -> list[str]:
        """No pictures, for the data is not what was asked; said once of a task."""
        if task not in self._warned:
            self.warn(f"{task}: samples whose data has changed have no picture ({why})")
            self._warned.add(task)
        return []

    def _table(self, task: str) -> Rows | None:
        if task not in self._rows:
            try:
                self._rows[task] = load_rows(BENCHMARKS[task], self.folders.get(task))
            except CommandError as error:
                self.warn(f"{task}: the page shows no pictures ({error})")
                self._rows[task] = None
        return self._rows[task]


def choose_samples(
    task: str, runs: Sequence[StoredRun], most: int
) -> list[tuple[Record, list[Record | None]]]:
    """The samples of a task that a page shows, those first on which the runs disagree.

    Returns:
        For each sample the record of the first run that has it, and the record of every run,
        None where a run was not asked it.
    """
    tables = [{record["index"]: record for record in run.records.get(task, ())} for run in runs]
    indices = sorted({index for table in tables for index in table})
    samples = []
    for index in indices:
        own = [table.get(index) for table in tables]
        first = next(record for record in own if record is not None)
        same = [record if record and _same(record, first) else None for record in own]
        samples.append((first, same))
    samples.sort(key=lambda sample: -_spread(sample[1]))  # stable: else in the order of rows
    return samples[:most]


def _same(record: Record, other: Record) -> bool:
    return (record["question_id"], record["references"]) == (
        other["question_id"],
        other["references"],
    )


def _spread(records: Sequence[Record | None]) -> float:
    scores = [record["score"] or 0.0 for record in records if record is not None]
    return max(scores) - min(scores)


def render_page(
    comparison: Comparison, runs: Sequence[StoredRun], pictures: Pictures, most: int
) -> str:
    """The page as text.

    Args:
        comparison: the runs side by side.
        runs: the same runs, in the same order.
        pictures: where pictures come from.
        most: number of samples of each task that are shown.
    """
    samples, shown = [], {}
    for task in dict.fromkeys(task for run in runs for task in run.records):
        chosen = choose_samples(task, runs, most)
        samples += [_sample(task, first, own, runs, pictures) for first, own in chosen]
        total = max(len(run.records.get(task, ())) for run in runs)
        shown[task] = f"{len(chosen)} of {total}"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(
        files("proxyv.eval").joinpath("page.html.j2").read_text(encoding="utf-8")
    )
    data = {"names": comparison.names, "samples": samples, "pictures": pictures.found}
    return template.render(
        comparison=comparison,
        runs=[_facts(name, run) for name, run in zip(comparison.names, runs, strict=True)],
        plots=[_plot(row) for row in comparison.rows],
        shown=shown,
        colours=COLOURS,
        footnote=FOOTNOTE,
        number=format_score,
        data=_script_data(data),
    )


def _sample(
    task: str,
    first: Record,
    own: Sequence[Record | None],
    runs: Sequence[StoredRun],
    pictures: Pictures,
) -> dict[str, Any]:
    asked_about = [  # a control shows other images than the question's own
        record.get("image_hash")
        for record, run in zip(own, runs, strict=True)
        if record is not None and not run.results.get("settings", {}).get("control")
    ]
    return {
        "task": task,
        "id": first["question_id"],
        "kind": first["kind"],
        "question": first["question"],
        "prompt": first["prompt"],
        "references": first["references"],
        "pictures": pictures.keys(task, first["index"], next(filter(None, asked_about), None)),
        "answers": [
            record and {key: record[key] for key in ("answer", "score", "error", "image_index")}
            for record in own
        ],
        "row": first["index"],
    }


def _facts(name: str, run: StoredRun) -> dict[str, Any]:
    results = run.results
    settings = results.get("settings", {})
    told = ("control", "dtype", "attention", "batch_size", "limit", "template")
    return {
        "name": name,
        "model": results["model"],
        "settings": ", ".join(
            f"{key} {settings[key]}" for key in told if settings.get(key) is not None
        ),
        "commit": short_commit(results.get("git_commit")),
        "date": results.get("date", "unknown"),
        "hardware": results.get("hardware", {}).get("device", "unknown"),
        "failed": sum(task["failed"] for task in results["tasks"].values()),
    }


def _plot(row: Row) -> dict[str, Any]:
    """Where the dots and intervals of a row stand, as shares of the width of its plot."""
    ends = [end for cell in row.cells if cell is not None for end in cell.interval]
    low, high = min(0.0, *ends), max(*ends, 1e-9)
    top = 1.0 if high <= 1 else high * 1.02

    def share(value: float) -> float:
        return round((value - low) / (top - low), 4)

    marks = [
        None
        if cell is None
        else {
            "value": share(cell.value),
            "low": share(cell.interval[0]),
            "high": share(cell.interval[1]),
            "text": format_score(cell.value, row.largest),
        }
        for cell in row.cells
    ]
    return {"task": row.task, "score": row.score, "marks": marks, "top": format_score(top, top)}


def _script_data(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data_uri(reference: ImageRef) -> str:
    image = reference.load()
    image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
