"""The images of a row, found but not decoded; `proxyv.data.images` opens them as training does.

Source: lmms-eval 0.7.3, ``doc_to_visual`` of the tasks. Differs, for every benchmark: transparent
parts become white, as in training, where the harness's ``convert("RGB")`` shows the colour stored
below them, mostly black.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxyv.data.images import DataError, ImageRef, image_of_bytes
from proxyv.eval.benchmarks import Benchmark
from proxyv.eval.sources import Rows

__all__ = ["row_images"]


def row_images(benchmark: Benchmark, rows: Rows, index: int) -> list[ImageRef]:
    """The images of a row, at least one, with their bytes.

    Raises:
        DataError: the row has no image, or its file cannot be read.
    """
    where = f"row {index}"
    cells = benchmark.images(rows[index])
    if not cells:
        raise DataError(f"{where} has no image", "missing image")
    return [image_of_bytes(_content(cell, rows.folder, where), where) for cell in cells]


def _content(cell: Any, folder: Path | None, where: str) -> bytes:
    """The encoded image in a cell: a path, bytes, or ``{"bytes", "path"}`` as in ``datasets``.

    A relative path starts at the folder and may not climb out of it; an absolute one, as downloads
    and saved tables have it, is followed too.
    """
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes) and cell:
        return cell
    if not isinstance(cell, str | os.PathLike) or not str(cell):
        raise DataError(f"{where} has no image", "missing image")
    if ".." in Path(cell).parts and not Path(cell).is_absolute():
        message = f"{where}: path {str(cell)!r} leads out of {folder}"
        raise DataError(message, "image outside its folder")
    file = Path(folder or ".", cell)
    try:
        return file.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        message = f"{where}: image {file} cannot be read ({reason})"
        raise DataError(message, "missing image") from error
