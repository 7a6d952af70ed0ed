"""Rows: a raw record checked and made into a conversation with its images.

Every error names the file, the row, its id and the field. Source: no counterpart; the authors'
loader replaces a failing row by random other rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from proxyv.data.images import DataError, ImageFolder, ImageRef
from proxyv.data.templates import IMAGE_MARK, Turn, as_turns

__all__ = ["Row", "parse_row", "subset_of"]

_DOCOWL_MARK = "<|image|>"  # how DocStruct4M marks an image


@dataclass(frozen=True)
class Row:
    """One conversation with its images.

    Attributes:
        where: file, row number and id, for error messages.
        turns: the messages, ending with an answer.
        images: in order of appearance.
        subset: the part of the set that it belongs to.
    """

    where: str
    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...]
    subset: str = ""


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
    images = _images(record.get("image"), where)
    turns = _turns(record, where, bool(images))
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
    if marks != len(images):
        raise DataError(
            f"{where}, field 'conversations': {marks} {IMAGE_MARK} in the text, but "
            f"{len(images)} image{'s' * (len(images) != 1)} in field 'image'",
            "wrong number of images",
        )
    references = tuple(ImageRef(folder, image, f"{where}, field 'image'") for image in images)
    return Row(where, tuple(turns), references, subset_of(record))


def subset_of(record: Any) -> str:
    """The part of a set that a record belongs to: what it says, else the folder of its image."""
    if not isinstance(record, Mapping):
        return "unreadable"
    for field in ("data_source", "dataset_name"):
        if isinstance(record.get(field), str) and record[field]:
            return _printable(record[field])
    image = record.get("image")
    image = image[0] if isinstance(image, list) and image else image
    if isinstance(image, Mapping):
        image = image.get("path") if not image.get("bytes") else "bytes"
    if isinstance(image, str) and image:
        folder = "/".join(Path(image).parent.parts[:2])
        return _printable(folder) or "images"
    return "images" if image else "text only"


def _printable(text: str) -> str:
    """The text with halves of surrogate pairs, which UTF-8 cannot say, written as JSON does."""
    return text.encode(errors="backslashreplace").decode()


def _turns(record: Mapping[str, Any], where: str, has_images: bool) -> list[Turn]:
    conversation = record.get("conversations", record.get("messages"))
    if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
        raise DataError(
            f"{where}, field 'conversations': expected a list of messages, got {conversation!r}"
        )
    try:
        turns = as_turns(conversation)
    except (ValueError, AttributeError) as error:
        raise DataError(f"{where}, field 'conversations': {error}") from error
    said = " ".join(turn.text for turn in turns if turn.role == "user")
    if has_images and IMAGE_MARK not in said and _DOCOWL_MARK in said:
        turns = [
            replace(turn, text=turn.text.replace(_DOCOWL_MARK, IMAGE_MARK))
            if turn.role == "user"
            else turn
            for turn in turns
        ]
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
        if isinstance(item, str) and item != _printable(item):
            raise DataError(f"{where}, field 'image': {item!a} is no Unicode text")
        images.append(item)
    return images
