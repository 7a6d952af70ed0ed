"""Rows of parquet files read where they lie, for a set that is not to be copied here first.

A parquet file tells its row groups in its last bytes, so that the number of every row is known
before one is read, and a row group can be fetched alone. Streamed rows therefore have an order that
is known beforehand, like any others: see ``LaneSampler`` for one that reads each group once.

Source: no counterpart in the authors' code.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from proxyv.data.images import DataError, ImageFolder
from proxyv.data.readers import file_stamp, parquet_files
from proxyv.data.rows import Row, parse_row
from proxyv.data.sampler import WINDOW_ROWS

__all__ = ["ParquetStream"]

_CONNECTIONS = 16  # files whose last bytes are asked for at the same time


class ParquetStream:
    """Rows of parquet files, from the hub or from disk, of which little more is held than in use.

    Args:
        path: a parquet file, a folder of them, or an id on the hub.
        folder: where images given by path are, and the size limit.

    Raises:
        FileNotFoundError: a folder without parquet files.
        DataError: no parquet, or no rows.
    """

    def __init__(self, path: str, folder: ImageFolder) -> None:
        self.path, self.folder = path, folder
        self._files = _find(path)
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            sizes = list(pool.map(_group_sizes, self._files))
        self._groups = [
            (file, number) for file, found in enumerate(sizes) for number in range(len(found))
        ]
        self._ends = np.cumsum([rows for found in sizes for rows in found], dtype=np.int64)
        if not len(self._ends) or not self._ends[-1]:
            raise DataError(f"{path}: no rows")
        self._most_held = WINDOW_ROWS + 2 * max(max(found, default=0) for found in sizes)
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._open: dict[int, Any] = {}
        self._held: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Row:
        """One row, its images not yet decoded."""
        return parse_row(self.record(index), f"{self.path} (streamed)", index, self.folder)

    def record(self, index: int) -> Any:
        """One row as it stands in its file; reads the row group that it is in, unless held."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self._process != os.getpid():
            self._forget()  # connections do not survive a fork
        group = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        return self._group(group).slice(index - start, 1).to_pylist()[0]

    @property
    def blocks(self) -> np.ndarray:
        """Row group of each row, (rows,) int64."""
        sizes = np.diff(self._ends, prepend=0)
        return np.repeat(np.arange(len(sizes)), sizes)

    @property
    def fingerprint(self) -> str:
        """What the files are known by (on the hub: address and commit), and the image folder."""
        here = [Path(file) for file in self._files if "://" not in file]
        there = [file for file in self._files if "://" in file]
        return " ".join([*there, file_stamp(here), str(self.folder)])

    def __getstate__(self) -> dict[str, Any]:
        """A worker process opens the files anew."""
        return {**self.__dict__, "_open": {}, "_held": OrderedDict()}

    def _group(self, group: int) -> Any:
        """A row group as a table; those used last are held."""
        if group in self._held:
            self._held.move_to_end(group)
            return self._held[group]
        file, number = self._groups[group]
        if file not in self._open:
            self._open = {file: _open(self._files[file])}  # one at a time: a set has hundreds
        table = self._held[group] = self._open[file].read_row_group(number)
        while sum(len(held) for held in self._held.values()) > self._most_held:
            self._held.popitem(last=False)
        return table


def _find(path: str) -> list[str]:
    """Files on this machine, or their addresses on the hub, in order."""
    if Path(path).exists():
        return [str(file) for file in parquet_files(path)]
    import datasets

    files = datasets.load_dataset_builder(path).config.data_files or {}
    found = [str(file) for file in files.get("train", ()) if str(file).endswith(".parquet")]
    if not found:
        raise FileNotFoundError(
            f"data.annotations={path}: no parquet file of a split 'train' on the hub"
        )
    return sorted(found)


def _open(file: str) -> Any:
    import fsspec
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(fsspec.open(file).open(), pre_buffer=True)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file}: not a complete parquet file ({error})") from error


def _group_sizes(file: str) -> list[int]:
    """Rows of each row group."""
    facts = _open(file).metadata
    return [facts.row_group(number).num_rows for number in range(facts.num_row_groups)]
