"""Finding reference outputs by pattern in the folder that PROXYV_GOLDEN names, if it names one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def golden_files(pattern: str) -> list[Path]:
    """Files of the folder that fit a pattern, none where the variable is not set."""
    folder = os.environ.get("PROXYV_GOLDEN")
    return sorted(Path(folder).glob(pattern)) if folder else []


def golden_rows(pattern: str) -> list[dict[str, Any]]:
    """All rows of the JSON Lines files that fit a pattern."""
    lines = [
        line
        for file in golden_files(pattern)
        for line in file.read_text("utf-8").split("\n")  # splitlines() would cut texts at U+2028
    ]
    return [json.loads(line) for line in lines if line]
