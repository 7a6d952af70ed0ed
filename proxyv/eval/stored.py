"""A finished run as it lies in its folder: `results.json` and the records of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxyv.cli import CommandError
from proxyv.eval.benchmarks import BENCHMARKS, Record
from proxyv.eval.records import read_records
from proxyv.files import read_json

__all__ = ["StoredRun", "load_run"]


@dataclass(frozen=True)
class StoredRun:
    """What a result folder holds.

    Attributes:
        folder: the folder.
        results: the content of its ``results.json``.
        records: for each task the records in the order of their rows.
    """

    folder: Path
    results: dict[str, Any]
    records: Mapping[str, Sequence[Record]]


def load_run(folder: Path) -> StoredRun:
    """Read a result folder.

    Raises:
        CommandError: there is no such folder, or it holds no finished run, or a damaged one.
    """
    path = folder / "results.json"
    if not path.is_file():
        problem = "no results.json, so no finished run; start its command again"
        raise CommandError(f"{folder}: {problem if folder.is_dir() else 'no such folder'}")
    results = read_json(path, "start the run again")
    records = {}
    for name, task in results["tasks"].items():
        if name not in BENCHMARKS:
            raise CommandError(f"{path} holds a task {name!r}, which is not known here")
        file = folder / f"{name}.jsonl"
        found = sorted(read_records(file), key=lambda record: record["index"])
        if len(found) != task["samples"]:
            raise CommandError(
                f"{file} holds {len(found)} samples, results.json was made from "
                f"{task['samples']}: the run was taken up again and stopped; finish it first"
            )
        records[name] = found
    return StoredRun(folder, results, records)
