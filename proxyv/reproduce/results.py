"""The result file of an arm with a seed: all that the report knows of it.

``docs/results/reproduction/<preset>/<arm>-seed<k>.json`` holds scores question by question, seed,
commits, resolved settings, versions, hardware, seconds, FLOPs, and times of prefills and training
steps; of an arm that failed, the reason. It is written in one step, so it is whole or not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxyv.cli import CommandError
from proxyv.eval.benchmarks import BENCHMARKS, Record
from proxyv.eval.compare import LOWER_IS_BETTER
from proxyv.files import read_json
from proxyv.reproduce.plan import STAGES, Job, Plan
from proxyv.train.config_files import settings_of
from proxyv.train.run import identity

__all__ = [
    "CURVE",
    "DONE",
    "FAILED",
    "Result",
    "pack",
    "read_result",
    "read_results",
    "result_file",
    "seed_dtype",
    "task_entry",
    "unpack",
]

DONE, FAILED = "done", "failed"
CURVE = "redundancy.json"
"""The redundancy curve of a preset's baseline, as ``python -m proxyv.study`` writes it."""
KEYS = ("preset", "arm", "seed", "status", "commit")
DONE_KEYS = (
    "tasks",
    "settings",
    "weights",
    "versions",
    "hardware",
    "training",
    "cost",
    "seconds",
)


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
    def dtype(self) -> str:
        """Type that its model was trained in."""
        return self.content["settings"]["finetune"]["model"]["dtype"]

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


def read_result(plan: Plan, job: Job, folder: Path) -> Result | None:
    """Read the result file of a job; None where there is none.

    Args:
        plan: the preset.
        job: an arm and its seed.
        folder: with the result files of the preset.

    Raises:
        CommandError: it is damaged, no result file, or was not made as the preset says now.
    """
    path = result_file(folder, job)
    return _read(plan, path) if path.is_file() else None


def read_results(plan: Plan, folder: Path) -> list[Result]:
    """Read all result files of a preset, in the order of their names.

    Raises:
        CommandError: see `read_result`; or an arm evaluated another model than the one whose own
            result is here.
    """
    found = [_read(plan, path) for path in sorted(folder.glob("*-seed*.json"))]
    table = {(result.arm, result.seed): result for result in found if result.done}
    for (arm, seed), result in table.items():
        source = table.get((plan.arms[arm].checkpoint or arm, seed), result)
        mine, theirs = (each.content["weights"] for each in (result, source))
        if mine != theirs:
            raise CommandError(
                f"{result.path} is of a model with weights {mine}, and {source.path.name} says "
                f"{theirs}: one of them was trained again; move both files and their folders of "
                "runs away and run both arms again"
            )
    _check_dtypes([result for result in found if result.done])
    return found


def seed_dtype(folder: Path, seed: int) -> str | None:
    """Type that the arms of a seed were trained in so far; None where none is done.

    Args:
        folder: with the result files of the preset.
        seed: of training.
    """
    for path in sorted(folder.glob(f"*-seed{seed}.json")):
        result = Result(path, read_json(path, "delete it and run the arm again"))
        if result.content.get("status") == DONE:
            return result.dtype
    return None


def _check_dtypes(results: Sequence[Result]) -> None:
    """Hold that the models of a seed were trained in one type, for they are compared."""
    first: dict[int, Result] = {}
    for result in results:
        other = first.setdefault(result.seed, result)
        if result.dtype != other.dtype:
            raise CommandError(
                f"{result.path.name} was trained in {result.dtype} and {other.path.name}, of the "
                f"same seed, in {other.dtype}: move one of them and its folder of runs away and "
                "run that arm again"
            )


def _read(plan: Plan, path: Path) -> Result:
    content = read_json(path, "delete it and run the arm again")
    needed = KEYS + (DONE_KEYS if content.get("status") == DONE else ("error",))
    missing = [key for key in needed if key not in content]
    if missing:
        raise CommandError(f"{path} is no result file: it has no {', '.join(missing)}")
    result = Result(path, content)
    name = f"{result.arm}-seed{result.seed}.json"
    if path.name != name:  # a copy that was put aside would count beside the file that it is of
        raise CommandError(f"{path} holds what is {name}: give it that name, or move it away")
    for what, found, wanted in _differences(plan, result):
        raise CommandError(
            f"{path}: {what} is {found!r} there, and {wanted!r} in the preset {plan.name}: undo "
            "that change, or move the file and its folder of runs away to run the arm again"
        )
    return result


def _differences(plan: Plan, result: Result) -> Iterator[tuple[str, Any, Any]]:
    """What a result was made with, where the preset says otherwise now: name, there, wanted."""
    content = result.content
    if content["preset"] != plan.name:
        yield "preset", content["preset"], plan.name
    if result.arm not in plan.arms:
        yield "arm", result.arm, f"one of {', '.join(plan.arms)}"
    if not result.done:
        return
    settings, job = content["settings"], Job(plan.arms[result.arm], result.seed)
    for name, found, wanted in (
        ("arm", settings["arm"], job.arm.settings()),
        ("world", settings["world"], plan.world),
        ("evaluation.answer_tokens", settings["evaluation"]["answer_tokens"], plan.answer_tokens),
    ):
        for key in dict.fromkeys([*wanted, *found]):
            if found.get(key) != wanted.get(key):  # what is not named was None: a new key, or none
                yield f"{name}.{key}", found.get(key), wanted.get(key)
    for stage in STAGES:
        trained = settings_of(settings[stage], str(result.path))
        runs = Path(str(trained.run.output_dir)).parents[1]
        asked = plan.stage(plan.trainer(plan.trained(job), stage), stage, runs)
        found, wanted = identity(trained, 1), identity(asked, 1)
        for key, value in wanted.items():
            if value not in (found[key], "auto"):  # what the machine decided is in the file
                yield f"{stage}: {key}", found[key], value
    for task, entry in content["tasks"].items():
        if task in plan.tasks:
            if entry["measure"] != plan.measure(task):
                yield f"the measure of {task}", entry["measure"], plan.measure(task)
            if entry["samples"] > plan.tasks[task]:
                yield f"the number of questions of {task}", entry["samples"], plan.tasks[task]
