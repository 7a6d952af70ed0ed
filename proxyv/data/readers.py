"""Readers of the data sets' own files: rows with their turns, and images decoded when asked for.

Two forms are read, both without holding the set in memory:

- JSON (one array, or one object a line) with images in folders: ShareGPT4V, LLaVA-NeXT raw,
  DocStruct4M. The file is memory-mapped and only the place of each row is kept.
- Parquet with image bytes, from a file, a folder or the hub: LLaVA-NeXT-Data. ``datasets`` maps it.

Source: no counterpart; the authors' loader reads the whole file into memory.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from proxyv.data.images import DataError, ImageFolder
from proxyv.data.rows import Row, parse_row

__all__ = ["JsonSource", "ParquetSource", "Source", "file_stamp", "parquet_files"]

_BLOCK_BYTES = 1 << 22
_FOOTER_BYTES = 1 << 16
_SPACE = re.compile(r"\s*")
_BETWEEN_ROWS = re.compile(r"[\s,]*")


class Source(Protocol):
    """Rows of a data set by number."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, index: int) -> Row:
        """One row, its images not yet decoded."""
        ...

    def record(self, index: int) -> Any:
        """One row as it stands in the file."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the files change, the image folder, or what is allowed of its images."""
        ...

    @property
    def blocks(self) -> np.ndarray | None:
        """(rows,) numbers, alike for rows that are read together; None where any row is as near."""
        ...


class JsonSource:
    """Rows of a JSON array or of JSON lines, read from a memory map one at a time.

    Args:
        path: the file.
        folder: where the images are.

    Raises:
        FileNotFoundError: no such file.
        DataError: the file is not JSON, or has no rows.
    """

    def __init__(self, path: Path, folder: ImageFolder) -> None:
        self.path, self.folder = path, folder
        with open(path, "rb") as file:
            text = _Text(path, file)
            self._spans = np.array(list(_row_spans(text)), dtype=np.int64).reshape(-1, 2)
        self._digest = text.digest.hexdigest()
        self._map: mmap.mmap | None = None
        if not len(self._spans):
            raise DataError(f"{path}: no rows")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._spans)

    def __getitem__(self, index: int) -> Row:
        """One row, its images not yet decoded."""
        return parse_row(self.record(index), str(self.path), index, self.folder)

    def record(self, index: int) -> Any:
        """One row as it stands in the file."""
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start, end = self._spans[index]
        return json.loads(self._map[start:end])

    blocks: np.ndarray | None = None

    @property
    def fingerprint(self) -> str:
        """Path and content of the file, and the image folder."""
        return f"{self.path}:{self._digest} {self.folder}"

    def __getstate__(self) -> dict[str, Any]:
        """A worker process opens the map anew."""
        return {**self.__dict__, "_map": None}


class _Text:
    """A text file read in blocks, with the byte at which the unread part begins.

    JSON is parsed in text but rows are found again by bytes, so both are counted.

    Attributes:
        digest: of everything read so far.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.digest = hashlib.blake2b(digest_size=16)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.position, self.done = "", 0, False
        self.byte = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(self.byte)

    def move(self, position: int) -> None:
        """Go on to a later character."""
        self.byte += len(self.text[self.position : position].encode())
        self.position = position

    def skip(self, pattern: re.Pattern[str]) -> str:
        """Go past what matches, reading on where the block ends; return the character there."""
        while True:
            match = pattern.match(self.text, self.position)
            self.move(match.end() if match else self.position)
            if self.position < len(self.text) or self.done:
                return self.text[self.position : self.position + 1]
            self.read()

    def read(self) -> None:
        """Read the next block, dropping what lies behind."""
        block = self._file.read(_BLOCK_BYTES)
        self.done = not block
        self.digest.update(block)
        try:
            more = self._decoder.decode(block, final=self.done)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: not UTF-8 text after byte {self.byte}") from error
        self.text, self.position = self.text[self.position :] + more, 0


def _row_spans(text: _Text) -> Iterator[tuple[int, int]]:
    """Yield first and last byte of each row of a JSON array or of JSON lines.

    Raises:
        DataError: a row is no JSON, the array does not end, or something comes after it.
    """
    parse, index = json.JSONDecoder().raw_decode, 0
    array = text.skip(_SPACE) == "["
    if array:
        text.move(text.position + 1)
    while text.skip(_BETWEEN_ROWS) not in ("", "]"):
        while True:
            try:
                _, end = parse(text.text, text.position)
                break
            except json.JSONDecodeError as error:
                if text.done:
                    raise DataError(
                        f"{text.path}: row {index} is not valid JSON ({error.msg}, near byte "
                        f"{text.byte}); is the file complete?"
                    ) from error
                text.read()
        start = text.byte
        text.move(end)
        yield start, text.byte
        index += 1
    if array:
        if text.skip(_SPACE) != "]":
            raise DataError(
                f"{text.path}: the list has no ']' after {index} rows; is the file complete?"
            )
        text.move(text.position + 1)
    if text.skip(_SPACE):
        raise DataError(
            f"{text.path}: something follows the last of {index} rows, at byte {text.byte}; give "
            "one list of rows, or one row a line"
        )


def parquet_files(path: str) -> list[Path]:
    """The parquet files that a path on this machine names, in order.

    Raises:
        FileNotFoundError: the folder has none.
    """
    found = Path(path)
    files = sorted(found.rglob("*.parquet")) if found.is_dir() else [found]
    if not files:
        raise FileNotFoundError(f"no parquet file in {path}")
    return files


class ParquetSource:
    """Rows of parquet files with image bytes, memory-mapped by ``datasets``.

    Args:
        path: a parquet file, a folder of them, or an id on the hub.
        folder: where images given by path are, and the size limit.
    """

    def __init__(self, path: str, folder: ImageFolder) -> None:
        import datasets

        self.path, self.folder = path, folder
        self._files = parquet_files(path) if Path(path).exists() else []
        if self._files:
            names = [str(file) for file in self._files]
            table = datasets.load_dataset("parquet", data_files=names, split="train")
        else:
            table = datasets.load_dataset(path, split="train")
        for name, feature in table.features.items():
            if (encoded := _encoded(feature)) is not None:
                table = table.cast_column(name, encoded)
        self._table = table
        if not len(table):
            raise DataError(f"{path}: no rows")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._table)

    def __getitem__(self, index: int) -> Row:
        """One row, its images not yet decoded."""
        return parse_row(self.record(index), self.path, index, self.folder)

    def record(self, index: int) -> Any:
        """One row as it stands in the table."""
        return self._table[int(index)]

    blocks: np.ndarray | None = None

    @property
    def fingerprint(self) -> str:
        """What the files or the hub's copy are known by, and the image folder."""
        known = file_stamp(self._files) if self._files else self._table._fingerprint
        return f"{known} {self.folder}"


def _encoded(feature: Any) -> Any:
    """The feature that gives images of a column as bytes; None for a column without images."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        inner = _encoded(feature.feature)
        return None if inner is None else type(feature)(inner)
    return None


def file_stamp(files: Sequence[Path]) -> str:
    """What tells one state of some parquet files from another: names, sizes and footers.

    A footer says where everything in its file lies, in which range and how often. Times are left
    out, for a copy on another machine has others.
    """
    stamps = []
    for path in files:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _FOOTER_BYTES, 0))
            footer = hashlib.blake2b(file.read(), digest_size=16).hexdigest()
        stamps.append(f"{path}:{size}:{footer}")
    return " ".join(stamps)
