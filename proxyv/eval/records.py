"""The JSONL file of a task: one line for each sample, written as it is scored, read to resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from proxyv.cli import CommandError
from proxyv.eval.benchmarks import Record

__all__ = ["append_records", "read_records", "rewrite_records", "write_json"]


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add records to the file and hand them to the operating system at once."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(lines)


def read_records(path: Path) -> list[Record]:
    """Read the records of an earlier run; a last line that was cut off is left out.

    Raises:
        CommandError: another line is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline at its end: the run was killed while writing
                break
            raise CommandError(
                f"{path}, line {number} is damaged ({error}); start again with --overwrite"
            ) from error
    return records


def rewrite_records(path: Path, records: Iterable[Record]) -> None:
    """Replace the file in one step."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    _replace(path, text)


def write_json(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    """Write a JSON file in one step, so that it is never seen half written."""
    _replace(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
