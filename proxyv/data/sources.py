"""Readers of the data sets' own files: rows with their turns, and images decoded when asked for.

Two forms are read, both without holding the set in memory:

- JSON (one array, or one object a line) with images in folders: ShareGPT4V, LLaVA-NeXT raw. The
  file is memory-mapped and only the place of each row is kept.
- Parquet with image bytes, from a file, a folder or the hub: LLaVA-NeXT-Data. ``datasets`` maps it.

Every error names the file, the row, its id and the field. Source: no counterpart; the authors'
loader replaces a failing row by random other rows.
"""

from __future__ import annotations

import codecs
import json
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from proxyv.data.images import DataError, ImageFolder, ImageRef
from proxyv.data.templates import IMAGE_MARK, Turn, as_turns

__all__ = [
    "JsonSource",
    "ParquetSource",
    "Row",
    "Source",
    "open_source",
]

_BLOCK_BYTES = 1 << 22
_SPACE = re.compile(r"\s*")
_BETWEEN_ROWS = re.compile(r"[\s,]*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Source(Protocol):
    """Rows of a data set by number."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, index: int) -> Row:
        """One row, its images not yet decoded."""
        ...


@dataclass(frozen=True)
class Row:
    """One conversation with its images.

    Attributes:
        where: file, row number and id, for error messages.
        turns: the messages, ending with an answer.
        images: in order of appearance.
    """

    where: str
    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...]


def parse_row(record: Any, file: str, index: int, folder: ImageFolder) -> Row:
    """Check a raw record and make a row of it.

    A leading answer without a question and a trailing question without an answer are left out:
    the first as in the authors' code, the second because nothing of it is learned.

    Raises:
        DataError: the record is no conversation, has no answer, or its ``<image>`` marks and its
            images differ in number.
    """
    where = f"{file}: row {index}"
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object, got {type(record).__name__}")
    where += f" (id {record['id']!r})" if record.get("id") is not None else ""
    turns = _turns(record, where)
    images = _images(record.get("image"), where)
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
    if marks != len(images):
        raise DataError(
            f"{where}, field 'conversations': {marks} {IMAGE_MARK} in the text, but "
            f"{len(images)} image{'s' * (len(images) != 1)} in field 'image'"
        )
    return Row(where, tuple(turns), tuple(ImageRef(folder, image, where) for image in images))


def _turns(record: Mapping[str, Any], where: str) -> list[Turn]:
    conversation = record.get("conversations")
    if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
        raise DataError(
            f"{where}, field 'conversations': expected a list of messages, got {conversation!r}"
        )
    try:
        turns = as_turns(conversation)
    except (ValueError, AttributeError) as error:
        raise DataError(f"{where}, field 'conversations': {error}") from error
    first = next((i for i, turn in enumerate(turns) if turn.role != "assistant"), len(turns))
    turns = turns[first:]
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if not turns:
        raise DataError(
            f"{where}, field 'conversations': no answer (no message from 'gpt' after a question)"
        )
    spoken = [turn.role for turn in turns if turn.role != "system"]
    for number, role in enumerate(spoken):
        if role != ("assistant" if number % 2 else "user"):
            raise DataError(
                f"{where}, field 'conversations': two messages in a row from {role!r}"
                f" (message {number}); questions and answers must alternate"
            )
    return turns


def _images(value: Any, where: str) -> list[str | bytes]:
    """Read field 'image': nothing, a path, ``datasets``' {bytes, path}, or a list of those."""
    if value is None or value == "":
        return []
    images: list[str | bytes] = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, Mapping):
            item = item.get("bytes") or item.get("path")
        if not isinstance(item, (str, bytes)) or not item:
            raise DataError(
                f"{where}, field 'image': expected a path or bytes, got {type(item).__name__}"
            )
        images.append(item)
    return images


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
        self._spans = np.array(list(_row_spans(path)), dtype=np.int64).reshape(-1, 2)
        self._map: mmap.mmap | None = None
        if not len(self._spans):
            raise DataError(f"{path}: no rows")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._spans)

    def __getitem__(self, index: int) -> Row:
        """One row, its images not yet decoded."""
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start, end = self._spans[index]
        return parse_row(json.loads(self._map[start:end]), str(self.path), index, self.folder)

    def __getstate__(self) -> dict[str, Any]:
        """A worker process opens the map anew."""
        return {**self.__dict__, "_map": None}


class _Text:
    """A text file read in blocks, with the byte at which the unread part begins.

    JSON is parsed in text but rows are found again by bytes, so both are counted.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
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
        try:
            more = self._decoder.decode(block, final=self.done)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: not UTF-8 text after byte {self.byte}") from error
        self.text, self.position = self.text[self.position :] + more, 0


def _row_spans(path: Path) -> Iterator[tuple[int, int]]:
    """Yield first and last byte of each row of a JSON array or of JSON lines."""
    parse = json.JSONDecoder().raw_decode
    with open(path, "rb") as file:
        text, index = _Text(path, file), 0
        if text.skip(_SPACE) == "[":
            text.move(text.position + 1)
        while text.skip(_BETWEEN_ROWS) not in ("", "]"):
            while True:
                try:
                    _, end = parse(text.text, text.position)
                    break
                except json.JSONDecodeError as error:
                    if text.done:
                        raise DataError(
                            f"{path}: row {index} is not valid JSON ({error.msg}, near byte "
                            f"{text.byte}); is the file complete?"
                        ) from error
                    text.read()
            start = text.byte
            text.move(end)
            yield start, text.byte
            index += 1


class ParquetSource:
    """Rows of parquet files with image bytes, memory-mapped by ``datasets``.

    Args:
        path: a parquet file, a folder of them, or an id on the hub.
        folder: where images given by path are, and the size limit.
    """

    def __init__(self, path: str, folder: ImageFolder) -> None:
        import datasets

        self.path, self.folder = path, folder
        if Path(path).exists():
            found = Path(path)
            files = sorted(str(f) for f in found.rglob("*.parquet")) if found.is_dir() else [path]
            if not files:
                raise FileNotFoundError(f"no parquet file in {path}")
            table = datasets.load_dataset("parquet", data_files=files, split="train")
        else:
            table = datasets.load_dataset(path, split="train")
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
        self._table = table
        if not len(table):
            raise DataError(f"{path}: no rows")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._table)

    def __getitem__(self, index: int) -> Row:
        """One row, its images not yet decoded."""
        return parse_row(self._table[int(index)], self.path, index, self.folder)


def open_source(annotations: str, images: str | None, **limits: Any) -> Source:
    """Open a data set by what its name says it is.

    Args:
        annotations: a ``.json``/``.jsonl`` file, a ``.parquet`` file, a folder of parquet files,
            or an id on the hub such as ``lmms-lab/LLaVA-NeXT-Data``.
        images: the folder that image paths are relative to.
        limits: see :class:`ImageFolder`.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a file of another kind.
    """
    if images is not None and not os.path.isdir(images):
        raise FileNotFoundError(f"data.images: no folder {images!r}")
    folder = ImageFolder(None if images is None else Path(images), **limits)
    path = Path(annotations)
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise FileNotFoundError(f"data.annotations: no file {annotations!r}")
        return JsonSource(path, folder)
    if path.is_dir() or (path.suffix == ".parquet" and path.is_file()):
        return ParquetSource(annotations, folder)
    if path.exists():
        raise ValueError(
            f"data.annotations={annotations!r}: expected .json, .jsonl, .parquet, a folder of "
            "parquet files, or an id on the hub"
        )
    if _HUB_ID.fullmatch(annotations) and path.suffix != ".parquet":
        return ParquetSource(annotations, folder)
    raise FileNotFoundError(f"data.annotations: no file or folder {annotations!r}")
