"""The benchmarks, one file each, and the table of their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxyv.cli import CommandError, nearest
from proxyv.eval.benchmarks.base import Benchmark, Record, Sample, Score
from proxyv.eval.benchmarks.ccpdf import CCpdf
from proxyv.eval.benchmarks.chartqa import ChartQA
from proxyv.eval.benchmarks.docvqa import DocVQA, DocVQATest
from proxyv.eval.benchmarks.gqa import GQA
from proxyv.eval.benchmarks.infovqa import InfoVQA, InfoVQATest
from proxyv.eval.benchmarks.mmbench import MMBench
from proxyv.eval.benchmarks.mme import MME
from proxyv.eval.benchmarks.ocrbench import OCRBench
from proxyv.eval.benchmarks.refcoco import RefCOCOTestA, RefCOCOTestB
from proxyv.eval.benchmarks.seedbench import SEEDBench
from proxyv.eval.benchmarks.textvqa import TextVQA
from proxyv.eval.metrics import mean

__all__ = ["BENCHMARKS", "GROUPS", "Benchmark", "Record", "Sample", "Score", "averages", "select"]

BENCHMARKS: dict[str, Benchmark] = {
    task.name: task
    for task in (
        *(DocVQA(), ChartQA(), InfoVQA(), TextVQA(), OCRBench()),
        *(MME(), MMBench(), SEEDBench(), GQA()),
        *(RefCOCOTestA(), RefCOCOTestB(), CCpdf()),
        *(DocVQATest(), InfoVQATest()),
    )
}

GROUPS: dict[str, tuple[str, ...]] = {
    "score_fine": ("docvqa", "chartqa", "infovqa", "textvqa", "ocrbench"),
    "refcoco": ("refcoco_testA", "refcoco_testB"),
}
"""Benchmarks whose main scores are averaged; the name of a group stands for its benchmarks."""


def select(names: str) -> list[Benchmark]:
    """Find benchmarks by name.

    Args:
        names: names of benchmarks or groups separated by commas, such as ``docvqa,refcoco``.

    Raises:
        CommandError: a name is unknown (the nearest one is named), or there is none.
    """
    allowed = [*BENCHMARKS, *GROUPS]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise CommandError(f"--tasks names no task (any of {', '.join(sorted(allowed))})")
    for name in wanted:
        if name not in allowed:
            raise CommandError(nearest("task", name, allowed))
    members = [member for name in wanted for member in GROUPS.get(name, (name,))]
    return [BENCHMARKS[name] for name in dict.fromkeys(members)]


def averages(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The average of each group whose benchmarks are all there, 0 to 100 as published.

    Args:
        tasks: entries of ``results.json`` by task; each counts once, whatever its size.
    """
    found = {}
    for group, members in GROUPS.items():
        if all(member in tasks for member in members):
            values = [
                tasks[member]["scores"][BENCHMARKS[member].main_score]["value"]
                for member in members
            ]
            found[group] = 100 * mean(values)
    return found
