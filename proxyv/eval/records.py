"""The JSONL file of a task: one line for each sample, written as it is scored, read to resume."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from proxyv.cli import CommandError
from proxyv.eval.benchmarks import Record
from proxyv.files import json_line, write_text

__all__ = ["append_records", "read_records", "rewrite_records"]

KEYS = ("index", "question_id", "prompt", "references", "answer", "score", "image_index", "error")


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add records to the file and hand them to the operating system at once."""
    lines = "".join(map(json_line, records))
    with path.open("a", encoding="utf-8") as stream:
        stream.write(lines)


def read_records(path: Path) -> list[Record]:
    """Read the records of an earlier run; a last line that was cut off is left out.

    Raises:
        CommandError: another line is damaged, or is no record.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline at its end: the run was killed while writing
                break
            raise CommandError(
                f"{path}, line {number} is damaged ({error}); start again with --overwrite"
            ) from error
        missing = [key for key in KEYS if not isinstance(record, dict) or key not in record]
        if missing:
            raise CommandError(
                f"{path}, line {number} is no record of an evaluation (it has no {missing[0]!r}); "
                "give another --output, or start again with --overwrite"
            )
        records.append(record)
    return records


def rewrite_records(path: Path, records: Iterable[Record]) -> None:
    """Replace the file in one step."""
    write_text(path, "".join(map(json_line, records)))
