"""Files that a reader sees whole or not at all, and JSON that any text survives."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxyv.cli import CommandError

__all__ = ["json_line", "read_json", "write_json", "write_text"]

_HALF = re.compile("[\ud800-\udfff]")


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: a reader, or a machine that died, has the old one or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def write_json(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    """Write a JSON file in one step."""
    write_text(path, _json(content, indent=2) + "\n")


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

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


def json_line(content: Any) -> str:
    """One line of a JSONL file, with its end."""
    return _json(content) + "\n"


def _json(content: Any, indent: int | None = None) -> str:
    """Readable JSON; half a surrogate pair, which UTF-8 cannot hold, is written as an escape."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    return _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", text)
