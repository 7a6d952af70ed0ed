"""What is wrong with a data set, row by row, before a training finds out."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from proxyv.data.images import FAULTS, DataError
from proxyv.data.mixture import MixtureSource
from proxyv.data.pipeline import RowPipeline
from proxyv.data.readers import JsonSource, Source
from proxyv.data.rows import Row, subset_of

__all__ = [
    "ERRORS",
    "NOTES",
    "CheckReport",
    "Finding",
    "check_clean",
    "check_source",
    "write_clean",
]

ERRORS = (*FAULTS, "empty turn", "nothing to supervise", "repeated row")
"""Why a row is left out of the clean list."""

NOTES = ("cut at the length limit", "repeated image")
"""What is counted but does no harm."""


@dataclass
class Finding:
    """What a look at one row found.

    Attributes:
        index: number of the row.
        subset: part of the set that it belongs to.
        images: images of the row.
        tokens: tokens of the row before any cut, or None where no tokenizer was given.
        image_keys: what each image is recognised by: its content, or its path.
        row_key: what the whole row is recognised by.
        faults: kind and message of everything found.
    """

    index: int
    subset: str
    images: int = 0
    tokens: int | None = None
    image_keys: tuple[bytes, ...] = ()
    row_key: bytes = b""
    faults: list[tuple[str, str]] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether the row belongs on the clean list."""
        return not any(kind in ERRORS for kind, _ in self.faults)


class _Examined(Dataset[Finding]):
    """A source whose items are findings; the work of the processes that check."""

    def __init__(self, source: Source, pipeline: RowPipeline | None, rows: int, decode: bool):
        self.source, self.pipeline, self.rows, self.decode = source, pipeline, rows, decode

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Finding:
        try:
            record = self.source.record(index)
        except ValueError as error:
            return Finding(index, "unreadable", faults=[("unreadable row", str(error))])
        finding = Finding(index, subset_of(record))
        try:
            row = self.source[index]
            self._look(row, finding)
        except DataError as error:
            finding.faults.append((error.kind, str(error)))
        return finding

    def _look(self, row: Row, finding: Finding) -> None:
        finding.images = len(row.images)
        for number, turn in enumerate(row.turns):
            if not turn.text.strip() and turn.role != "system":  # an image alone is a question
                text = f"{row.where}: message {number} (from {turn.role!r}) says nothing"
                finding.faults.append(("empty turn", text))
        keys = []
        for reference in row.images:
            if self.decode:
                reference.load()
                keys.append(_digest(reference.content()))
            else:
                reference.size_hw()
                image = reference.image
                keys.append(_digest(image if isinstance(image, bytes) else image.encode()))
        said = "\0".join(f"{turn.role}\0{turn.text}" for turn in row.turns)
        finding.image_keys, finding.row_key = tuple(keys), _digest(said.encode(), *keys)
        if self.pipeline is not None:
            self._measure(row, finding, self.pipeline)

    @staticmethod
    def _measure(row: Row, finding: Finding, pipeline: RowPipeline) -> None:
        done = pipeline.render(row, pipeline.count_crops(row))
        finding.tokens = len(done.input_ids)
        if done.hidden:
            text = (
                f"{row.where}: longer than {pipeline.max_length} tokens, which hides {done.hidden} "
                f"of {done.hidden + done.num_supervised} supervised ones"
            )
            finding.faults.append(("cut at the length limit", text))
        if not done.num_supervised:
            finding.faults.append(("nothing to supervise", f"{row.where}: no answer is left"))


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


@dataclass
class CheckReport:
    """Counts of a whole set and of its parts.

    Attributes:
        rows: rows looked at, by subset.
        images: images, by subset.
        tokens: tokens, by subset, cut rows counted as cut.
        faults: kind of fault to its count, by subset; a row counts once for each kind.
        examples: messages of the first rows of each kind.
        clean: numbers of the rows of the clean list.
    """

    rows: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    faults: dict[str, Counter[str]] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    clean: list[int] = field(default_factory=list)

    def add(self, finding: Finding, examples: int) -> None:
        """Count a row."""
        name = finding.subset
        self.rows[name] += 1
        self.images[name] += finding.images
        self.tokens[name] += finding.tokens or 0
        counts = self.faults.setdefault(name, Counter())
        counts.update({kind for kind, _ in finding.faults})
        for kind, message in finding.faults:
            known = self.examples.setdefault(kind, [])
            if len(known) < examples:
                known.append(message)
        if finding.clean:
            self.clean.append(finding.index)

    def total(self, kind: str) -> int:
        """Rows with a fault of this kind."""
        return sum(counts[kind] for counts in self.faults.values())

    @property
    def kinds(self) -> list[str]:
        """Kinds of fault that occur, the worst first."""
        return [kind for kind in (*ERRORS, *NOTES) if self.total(kind)]

    def as_dict(self) -> dict[str, Any]:
        """The report for ``--json``; the row numbers are left to the clean list."""
        return {
            "rows": sum(self.rows.values()),
            "clean": len(self.clean),
            "faults": {kind: self.total(kind) for kind in self.kinds},
            "subsets": {
                name: {
                    "rows": self.rows[name],
                    "images": self.images[name],
                    "mean_tokens": round(self.tokens[name] / self.rows[name], 1),
                    "faults": dict(self.faults[name]),
                }
                for name in sorted(self.rows)
            },
            "examples": self.examples,
        }


def check_source(
    source: Source,
    pipeline: RowPipeline | None,
    *,
    decode: bool = True,
    limit: int | None = None,
    workers: int = 0,
    examples: int = 3,
    progress: bool = False,
) -> CheckReport:
    """Look at every row of a source.

    Args:
        source: the rows.
        pipeline: template and crops, to count tokens; None leaves lengths out.
        decode: decode every image and compare images by content; otherwise only headers are read
            and images compared by path.
        limit: look only at the first rows.
        workers: processes that work on it; 0 works in this one.
        examples: messages kept of each kind of fault.
        progress: show a bar on stderr.
    """
    rows = len(source) if limit is None else min(limit, len(source))
    loader = DataLoader(
        _Examined(source, pipeline, rows, decode),
        batch_size=32,
        num_workers=workers,
        collate_fn=list,
    )
    report = CheckReport()
    for finding in _repeats(_each(tqdm(loader, unit="x32 rows", disable=not progress))):
        report.add(finding, examples)
    return report


def _each(batches: Iterable[list[Finding]]) -> Iterator[Finding]:
    for batch in batches:
        yield from batch


def _repeats(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Add what only a look at all rows shows: images and whole rows that came before."""
    images: set[bytes] = set()
    rows: dict[bytes, int] = {}
    for finding in findings:
        where = f"row {finding.index}"
        if any(key in images for key in finding.image_keys):
            finding.faults.append(("repeated image", f"{where}: its image is in an earlier row"))
        images.update(finding.image_keys)
        if finding.row_key:
            first = rows.setdefault(finding.row_key, finding.index)
            if first != finding.index:
                text = f"{where}: the same image and conversation as row {first}"
                finding.faults.append(("repeated row", text))
        yield finding


def check_clean(source: Source, path: Path) -> None:
    """Refuse a clean list that could not be written, before the rows are looked at.

    Args:
        source: what will be checked.
        path: see :func:`write_clean`.

    Raises:
        ValueError: another ending, rows that are not JSON, or rows of a mixture.
        FileNotFoundError: no such folder.
    """
    if isinstance(source, MixtureSource):
        raise ValueError(
            f"--write-clean {path}: row numbers count within each set of a mixture; check its "
            "sets one by one, and name each list as 'rows' of its set"
        )
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"--write-clean {path}: expected a name ending in .txt or .jsonl")
    if path.suffix == ".jsonl" and not isinstance(source, JsonSource):
        raise ValueError(
            f"--write-clean {path}: only rows of one JSON file can be written as .jsonl; write "
            "a .txt of row numbers, and name it as 'rows' in a mixture"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--write-clean {path}: no folder {path.parent}; make it first")


def write_clean(source: Source, report: CheckReport, path: Path) -> None:
    """Write the clean list.

    Args:
        source: what was checked.
        report: of the whole source.
        path: ``.txt`` for row numbers, one a line (``rows`` of a mixture), or ``.jsonl`` for the
            rows themselves, where they come from JSON.

    Raises:
        ValueError: another ending, or rows that are not JSON.
        FileNotFoundError: no such folder.
    """
    check_clean(source, path)
    partial = path.with_name(path.name + ".partial")
    # What UTF-8 cannot say (half a surrogate pair) is written as JSON escapes it.
    with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for index in report.clean:
            if path.suffix == ".txt":
                file.write(f"{index}\n")
            else:
                file.write(json.dumps(source.record(index), ensure_ascii=False) + "\n")
    os.replace(partial, path)
