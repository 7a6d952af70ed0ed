"""The score of a finished run: the mean of its tasks' main scores, in percent, with its interval.

With the paper's five tasks this is its Score_fine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxyv.cli import CommandError
from proxyv.config import ProxyVConfig
from proxyv.eval.benchmarks import BENCHMARKS, Benchmark, select
from proxyv.eval.compare import same_questions
from proxyv.eval.metrics import mean
from proxyv.eval.statistics import Difference, average_interval, paired_difference
from proxyv.eval.stored import StoredRun
from proxyv.profiling.shapes import arm_name

__all__ = [
    "RunScore",
    "difference",
    "model_config",
    "run_name",
    "score_run",
    "select_averaged",
    "shared_tasks",
]


@dataclass(frozen=True)
class RunScore:
    """A score in percent.

    Attributes:
        parts: scores of the questions (or groups of questions) of each task.
        tasks: main score of each task, in percent.
        value: their mean.
        interval: 95 % bootstrap interval of the mean.
    """

    parts: Mapping[str, Sequence[float]]
    tasks: Mapping[str, float]
    value: float
    interval: tuple[float, float]


def shared_tasks(runs: Sequence[StoredRun]) -> list[str]:
    """The scored tasks that all runs have, in the order of the first run.

    Raises:
        CommandError: there is none, or runs were asked different questions.
    """
    tasks = [
        name
        for name in runs[0].records
        if BENCHMARKS[name].scored and all(name in run.records for run in runs)
    ]
    if not tasks:
        folders = ", ".join(str(run.folder) for run in runs)
        raise CommandError(f"these runs have no scored task in common: {folders}")
    for run in runs[1:]:
        for task in tasks:
            if not same_questions(task, runs[0], run):
                raise CommandError(
                    f"{task}: {runs[0].folder} and {run.folder} were not asked the same questions"
                )
    return tasks


def score_run(run: StoredRun, tasks: Sequence[str]) -> RunScore:
    """Score a run on some of its tasks.

    Raises:
        CommandError: a task whose score is no share, such as MMBench's, cannot be averaged.
    """
    parts: dict[str, Sequence[float]] = {}
    for task in tasks:
        benchmark = BENCHMARKS[task]
        _check_share(benchmark)
        parts[task] = benchmark.scores(run.records[task])[benchmark.main_score].parts
    low, high = average_interval(list(parts.values()))
    values = {task: 100 * mean(own) for task, own in parts.items()}
    return RunScore(parts, values, mean(list(values.values())), (100 * low, 100 * high))


def select_averaged(names: str) -> list[Benchmark]:
    """The benchmarks that ``--tasks`` names.

    Raises:
        CommandError: an unknown one, or one whose score cannot be averaged with others.
    """
    chosen = select(names)
    for benchmark in chosen:
        if not benchmark.scored:
            raise CommandError(
                f"{benchmark.name}: its answers are known to a test server only; leave the task out"
            )
        _check_share(benchmark)
    return chosen


def _check_share(benchmark: Benchmark) -> None:
    if not benchmark.is_share:
        raise CommandError(
            f"{benchmark.name}: {benchmark.main_score} is no share between 0 and 1, so it cannot "
            "be averaged with others; leave the task out"
        )


def difference(score: RunScore, base: RunScore) -> Difference:
    """How a score differs from another one on the same questions, in points.

    Raises:
        ValueError: the numbers of questions differ.
    """
    found = paired_difference(list(score.parts.values()), list(base.parts.values()))
    low, high = found.interval
    return found._replace(value=100 * found.value, interval=(100 * low, 100 * high))


def model_config(run: StoredRun) -> Any:
    """The configuration of the model that a run asked."""
    return ProxyVConfig.from_dict(run.results["config"])


def run_name(run: StoredRun) -> str:
    """What tables call a run: the kind of model, and what of it was masked."""
    config, settings = model_config(run), run.results["settings"]
    masked = settings.get("masked_layers")
    if not masked:
        return arm_name(config)
    first = config.text_config.num_hidden_layers - masked
    return f"{arm_name(config)}, masked from L{first}"
