"""Opening a data set by what its name says it is: a file, a folder, an id on the hub, a mixture."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxyv.cli import place
from proxyv.data.images import ImageFolder
from proxyv.data.mixture import open_mixture
from proxyv.data.readers import JsonSource, ParquetSource, Source
from proxyv.data.stream import ParquetStream

__all__ = ["open_source"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_source(
    annotations: str, images: str | None, *, streaming: bool = False, **limits: Any
) -> Source:
    """Open a data set by what its name says it is.

    Args:
        annotations: a ``.json``/``.jsonl`` file, a ``.parquet`` file, a folder of parquet files,
            an id on the hub such as ``lmms-lab/LLaVA-NeXT-Data``, or a ``.yaml`` mixture of those.
        images: the folder that image paths are relative to.
        streaming: read parquet where it lies, see ``stream.py``, instead of copying it into the
            cache of ``datasets`` first. JSON is always read where it lies.
        limits: see :class:`ImageFolder`.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a file of another kind.
    """

    def open_set(one: str, its_images: str | None) -> Source:
        return _open_set(one, its_images, streaming, limits)

    if Path(annotations).suffix in (".yaml", ".yml"):
        return open_mixture(Path(annotations), images, open_set)
    return open_set(annotations, images)


def _open_set(
    annotations: str, images: str | None, streaming: bool, limits: Mapping[str, Any]
) -> Source:
    """Open a data set that is no mixture."""
    if images is not None and not os.path.isdir(images):
        raise FileNotFoundError(
            f"data.images: no folder {place(images)}; data/README.md says where real sets come "
            "from, and python -m proxyv.synthetic --out data/generated draws the small one"
        )
    folder = ImageFolder(None if images is None else Path(images), **limits)
    path = Path(annotations)
    reader = ParquetStream if streaming else ParquetSource
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise FileNotFoundError(f"data.annotations: no file {place(annotations)}")
        return JsonSource(path, folder)
    if path.is_dir() or (path.suffix == ".parquet" and path.is_file()):
        return reader(annotations, folder)
    if path.exists():
        raise ValueError(
            f"data.annotations={annotations!r}: expected .json, .jsonl, .parquet, a folder of "
            "parquet files, a .yaml mixture, or an id on the hub"
        )
    if _HUB_ID.fullmatch(annotations) and path.suffix != ".parquet":
        return reader(annotations, folder)
    raise FileNotFoundError(f"data.annotations: no file or folder {place(annotations)}")
