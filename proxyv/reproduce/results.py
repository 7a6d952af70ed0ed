"""The result file of an arm with a seed: all that the report knows of it.

``docs/results/reproduction/<preset>/<arm>-seed<k>.json`` holds scores question by question, seed,
commits, resolved settings, versions, hardware, seconds, FLOPs, and times of prefills and training
steps; of an arm that failed, the reason. It is written in one step, so it is whole or not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxyv.cli import CommandError
from proxyv.eval.benchmarks import BENCHMARKS, Record
from proxyv.eval.compare import LOWER_IS_BETTER
from proxyv.eval.records import write_json
from proxyv.reproduce.plan import Job

__all__ = [
    "CURVE",
    "DONE",
    "FAILED",
    "Result",
    "pack",
    "read_result",
    "read_results",
    "result_file",
    "task_entry",
    "unpack",
    "write_result",
]

DONE, FAILED = "done", "failed"
CURVE = "redundancy.json"
"""The redundancy curve of a preset's baseline, as ``python -m proxyv.study`` writes it."""
KEYS = ("preset", "arm", "seed", "status", "commit")
DONE_KEYS = ("tasks", "settings", "versions", "hardware", "training", "cost", "seconds")


@dataclass(frozen=True)
class Result:
    """A result file.

    Attributes:
        path: the file.
        content: what it holds.
    """

    path: Path
    content: Mapping[str, Any]

    @property
    def arm(self) -> str:
        """Name of the arm."""
        return self.content["arm"]

    @property
    def seed(self) -> int:
        """Seed of training."""
        return self.content["seed"]

    @property
    def done(self) -> bool:
        """Whether the arm was trained and evaluated to its end."""
        return self.content["status"] == DONE

    def parts(self, task: str) -> list[float] | None:
        """One number for each question of a task, the higher the better; None where not asked."""
        entry = self.content["tasks"].get(task)
        if entry is None:
            return None
        found = unpack(entry["scores"][entry["measure"]])
        return [1 - part for part in found] if entry["measure"] in LOWER_IS_BETTER else found

    def questions(self, task: str) -> str | None:
        """What names the questions of a task and their measure; None where it was not asked.

        Scores of two runs can be compared where it is equal.
        """
        entry = self.content["tasks"].get(task)
        return None if entry is None else f"{entry['questions']} by {entry['measure']}"


def result_file(folder: Path, job: Job) -> Path:
    """Where the result of a job goes."""
    return folder / f"{job.name}.json"


def pack(parts: Iterable[float]) -> str:
    """Scores of the questions as one line, six digits each."""
    return " ".join(f"{part:.6g}" for part in parts)


def unpack(text: str) -> list[float]:
    """The numbers that `pack` wrote."""
    return [float(part) for part in text.split()]


def task_entry(task: str, records: Sequence[Record], measure: str | None = None) -> dict[str, Any]:
    """What a result file keeps of a task: the score that counts, and the benchmark's main one.

    Args:
        task: name of the benchmark.
        records: of all questions.
        measure: the score that counts; None for the main one.

    Raises:
        ValueError: the benchmark has no such score.
    """
    benchmark = BENCHMARKS[task]
    measure = measure or benchmark.main_score
    found = benchmark.scores(records)
    if measure not in found:
        raise ValueError(f"measures: {task}: {measure!r} is not one of {', '.join(found)}")
    kept = {name: found[name] for name in dict.fromkeys((measure, benchmark.main_score))}
    asked = [[str(r[key]) for key in ("index", "question_id", "references")] for r in records]
    return {
        "samples": len(records),
        "measure": measure,
        "value": kept[measure].value,
        "questions": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
        "scores": {name: pack(score.parts) for name, score in kept.items()},
    }


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file in one step."""
    write_json(path, dict(content))


def read_result(path: Path) -> Result | None:
    """Read a result file; None where there is none.

    Raises:
        CommandError: it is damaged, or no result file.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CommandError(
            f"{path} is damaged ({error}); delete it and run the arm again"
        ) from error
    needed = KEYS + (DONE_KEYS if content.get("status") == DONE else ("error",))
    missing = [key for key in needed if key not in content]
    if missing:
        raise CommandError(f"{path} is no result file: it has no {', '.join(missing)}")
    return Result(path, content)


def read_results(folder: Path) -> list[Result]:
    """Read all result files of a preset, in the order of their names."""
    found = (read_result(path) for path in sorted(folder.glob("*-seed*.json")))
    return [result for result in found if result is not None]
