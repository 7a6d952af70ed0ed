"""Any number of finished runs side by side: scores, categories, and whether they really differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxyv.eval.benchmarks import BENCHMARKS, GROUPS, Record
from proxyv.eval.metrics import mean
from proxyv.eval.statistics import (
    Difference,
    average_interval,
    paired_difference,
)
from proxyv.eval.stored import StoredRun

__all__ = ["LOWER_IS_BETTER", "Cell", "Comparison", "Row", "compare", "name_runs", "same_questions"]

LOWER_IS_BETTER = ("doc_edit_distance",)
PERCENT = 100.0


@dataclass(frozen=True)
class Cell:
    """A score of one run with its 95 % interval, and how many samples (or groups) it covers."""

    value: float
    interval: tuple[float, float]
    samples: int


@dataclass(frozen=True)
class Row:
    """One score of every run.

    Attributes:
        task: benchmark, or group of benchmarks.
        score: name of the score, or of a category.
        cells: one for each run, None where the run lacks it.
        differences: for each run after the first its difference from the first; None where it
            was not asked the same questions.
    """

    task: str
    score: str
    cells: tuple[Cell | None, ...]
    differences: tuple[Difference | None, ...]

    @property
    def lower_is_better(self) -> bool:
        """Whether a small value is a good one."""
        return self.score in LOWER_IS_BETTER

    @property
    def largest(self) -> float:
        """The largest number in the row, which decides how many digits it shows."""
        return max(cell.interval[1] for cell in self.cells if cell is not None)

    @property
    def best(self) -> float | None:
        """The best value, None for a single run."""
        values = [cell.value for cell in self.cells if cell is not None]
        choose = min if self.lower_is_better else max
        return choose(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        names: short names of the runs.
        rows: scores of each task, its main score first, then averages of groups of tasks.
        categories: shares of right answers in each part of a task.
        notes: what a reader must know, such as tasks whose questions differ.
    """

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    categories: tuple[Row, ...]
    notes: tuple[str, ...]


def name_runs(folders: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell the runs apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(path)} ({number})" for number, path in enumerate(parts, start=1)]


def compare(runs: Sequence[StoredRun]) -> Comparison:
    """Put runs side by side; differences are from the first one."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.records))
    rows, categories, notes = [], [], []
    parts: list[dict[str, Any]] = [{} for _ in runs]
    for task in (task for task in tasks if BENCHMARKS[task].scored):
        alike = [same_questions(task, runs[0], run) for run in runs]
        names = name_runs([run.folder for run in runs])
        different = [
            name
            for name, run, same in zip(names, runs, alike, strict=True)
            if task in run.records and task in runs[0].records and not same
        ]
        if different:
            notes.append(
                f"{task}: {', '.join(different)} was not asked the same questions as {names[0]}, "
                "so the difference is not tested"
            )
        for own, run in zip(parts, runs, strict=True):
            if task in run.records:
                own[task] = BENCHMARKS[task].scores(run.records[task])
        main = BENCHMARKS[task].main_score
        scores = dict.fromkeys([main, *(score for own in parts for score in own.get(task, ()))])
        for score in scores:
            found = [_parts(own, task, score) for own in parts]
            rows.append(_row(task, score, [[part] if part else None for part in found], alike))
        kinds = _kinds(task, runs)
        for kind in sorted(kinds - set(scores)) if len(kinds) > 1 else ():
            found = [_of_kind(run.records.get(task, ()), kind) for run in runs]
            categories.append(_row(task, kind, [[part] if part else None for part in found], alike))
    rows += _averages(runs, parts)
    return Comparison(tuple(name_runs([run.folder for run in runs])), tuple(rows),
                      tuple(categories), tuple(notes))  # fmt: skip


def _parts(own: Mapping[str, Any], task: str, score: str) -> Sequence[float] | None:
    found = own.get(task, {}).get(score)
    return None if found is None else found.parts


def _kinds(task: str, runs: Sequence[StoredRun]) -> set[str]:
    """Parts of the data set, as far as questions name theirs."""
    records = [record for run in runs for record in run.records.get(task, ())]
    return {str(record["kind"]) for record in records if record["kind"] is not None}


def _of_kind(records: Sequence[Record], kind: str) -> list[float]:
    return [record["score"] for record in records if str(record["kind"]) == kind]


def same_questions(task: str, first: StoredRun, second: StoredRun) -> bool:
    """Whether both runs were asked the questions of a task, and the same ones."""

    def asked(run: StoredRun) -> list[tuple[Any, ...]]:
        keys = ("index", "question_id", "references")
        return [tuple(map(str, map(record.get, keys))) for record in run.records[task]]

    if task not in first.records or task not in second.records:
        return False
    return asked(first) == asked(second)


def _row(
    task: str,
    score: str,
    strata: Sequence[Sequence[Sequence[float]] | None],
    alike: Sequence[bool],
    factor: float = 1.0,
) -> Row:
    """One row from the parts of each run (``strata``), of one or several benchmarks."""
    cells: list[Cell | None] = []
    for own in strata:
        if own is None:
            cells.append(None)
            continue
        low, high = average_interval(own)
        value = factor * mean([mean(part) for part in own])
        cells.append(Cell(value, (factor * low, factor * high), sum(map(len, own))))
    differences: list[Difference | None] = []
    for own, same in zip(strata[1:], alike[1:], strict=True):
        first = strata[0]
        if own is None or first is None or not same:
            differences.append(None)
            continue
        found = paired_difference(own, first)
        low, high = found.interval
        differences.append(
            found._replace(value=factor * found.value, interval=(factor * low, factor * high))
        )
    return Row(task, score, tuple(cells), tuple(differences))


def _averages(runs: Sequence[StoredRun], parts: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The average of each group that at least one run has complete, from 0 to 100."""
    rows = []
    for group, members in GROUPS.items():
        strata = [
            [own[member][BENCHMARKS[member].main_score].parts for member in members]
            if all(member in own for member in members)
            else None
            for own in parts
        ]
        if any(own is not None for own in strata):
            alike = [all(same_questions(task, runs[0], run) for task in members) for run in runs]
            rows.append(_row(group, "average x 100", strata, alike, PERCENT))
    return rows
