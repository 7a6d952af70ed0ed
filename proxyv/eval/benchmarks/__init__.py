"""The benchmarks, one file each, and the table of their names."""

from __future__ import annotations

from proxyv.cli import CommandError, nearest
from proxyv.eval.benchmarks.base import Benchmark, Record, Sample
from proxyv.eval.benchmarks.chartqa import ChartQA
from proxyv.eval.benchmarks.docvqa import DocVQA

__all__ = ["BENCHMARKS", "Benchmark", "Record", "Sample", "select"]

BENCHMARKS: dict[str, Benchmark] = {task.name: task for task in (DocVQA(), ChartQA())}


def select(names: str) -> list[Benchmark]:
    """Find benchmarks by name.

    Args:
        names: names separated by commas, such as ``docvqa,chartqa``.

    Raises:
        CommandError: a name is unknown (the nearest one is named), or there is none.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not wanted:
        raise CommandError(f"--tasks names no task (any of {', '.join(sorted(BENCHMARKS))})")
    for name in wanted:
        if name not in BENCHMARKS:
            raise CommandError(nearest("task", name, BENCHMARKS))
    return [BENCHMARKS[name] for name in wanted]
