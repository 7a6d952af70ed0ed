"""The JSONL file of a task: one line for each sample, written as it is scored, read to resume."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from proxyv.cli import CommandError
from proxyv.eval.benchmarks import Record

__all__ = ["append_records", "read_json", "read_records", "rewrite_records", "write_json"]

KEYS = ("index", "question_id", "prompt", "references", "answer", "score", "image_index", "error")
_HALF = re.compile("[\ud800-\udfff]")


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add records to the file and hand them to the operating system at once."""
    lines = "".join(_json(record) + "\n" for record in records)
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


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Read a JSON file that `write_json` wrote, one that holds an object.

    Args:
        path: the file.
        advice: what to do about a damaged one, for the message.

    Raises:
        CommandError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise CommandError(f"{path} is damaged ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise CommandError(f"{path} is damaged (it holds no JSON object); {advice}")
    return content


def rewrite_records(path: Path, records: Iterable[Record]) -> None:
    """Replace the file in one step."""
    text = "".join(_json(record) + "\n" for record in records)
    _replace(path, text)


def write_json(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    """Write a JSON file in one step, so that it is never seen half written."""
    _replace(path, _json(content, indent=2) + "\n")


def _json(content: Any, indent: int | None = None) -> str:
    """Readable JSON; half a surrogate pair, which UTF-8 cannot hold, is written as an escape."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    return _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
