"""Mixtures: several data sets as one, each with a weight, and lists of the rows to use.

A YAML file lists them::

    - annotations: data/llava-next
    - annotations: data/docstruct4m/struct_aware_parse.jsonl
      images: data/docstruct4m
      weight: 0.1             # a tenth of its rows, always the same ones
    - annotations: data/mine.json
      images: data/mine
      rows: data/mine-clean.txt   # row numbers, as `python -m proxyv.data check` writes them
      weight: 2               # every row twice in a pass

Source: authors' ``sampling_strategy`` (first, end, random). Differs: a seeded choice of rows
instead of one that changes from run to run, and weights above one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from proxyv.cli import nearest, place
from proxyv.data.readers import Source
from proxyv.data.rows import Row
from proxyv.data.sampler import WINDOW_ROWS

__all__ = ["MixtureSource", "Part", "open_mixture", "read_rows"]

_SEED = 0  # of which rows a weight below one takes


@dataclass(frozen=True)
class Part:
    """One entry of a mixture.

    Attributes:
        annotations: as ``data.annotations``.
        images: as ``data.images``; null takes that setting.
        weight: how often each row is seen in a pass; a share of the rows where below one.
        rows: text file of row numbers to use; null uses all.
    """

    annotations: str
    images: str | None = None
    weight: float = 1.0
    rows: str | None = None


class MixtureSource:
    """Several sources as one.

    Args:
        sources: the sources.
        rows: row numbers of each that may be used; None for all of its rows.
        weights: how often each row of a source is seen.

    Raises:
        ValueError: a weight is not positive, a row number does not exist, or nothing is left.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        rows: Sequence[np.ndarray | None],
        weights: Sequence[float],
    ) -> None:
        self.sources = list(sources)
        entries = enumerate(zip(sources, rows, weights, strict=True))
        taken = [
            _taken(len(source), chosen, weight, number)
            for number, (source, chosen, weight) in entries
        ]
        self._row = np.concatenate(taken)
        self._part = np.repeat(np.arange(len(taken), dtype=np.int32), [len(t) for t in taken])
        if not len(self._row):
            raise ValueError("the mixture has no rows: raise a weight or list rows")

    def __len__(self) -> int:
        """Number of rows, repetitions counted."""
        return len(self._row)

    def __getitem__(self, index: int) -> Row:
        """One row, its images not yet decoded."""
        return self.sources[self._part[index]][int(self._row[index])]

    def record(self, index: int) -> Any:
        """One row as it stands in its file."""
        return self.sources[self._part[index]].record(int(self._row[index]))

    @property
    def blocks(self) -> np.ndarray | None:
        """(rows,) blocks of the sources, numbered on; what has none is cut into windows."""
        found = [source.blocks for source in self.sources]
        if all(blocks is None for blocks in found):
            return None
        numbers, first = np.empty(len(self), dtype=np.int64), 0
        for part, (source, known) in enumerate(zip(self.sources, found, strict=True)):
            blocks = np.arange(len(source)) // WINDOW_ROWS if known is None else known
            mine = self._part == part
            numbers[mine] = first + blocks[self._row[mine]]
            first += int(blocks[-1]) + 1
        return numbers

    @property
    def fingerprint(self) -> str:
        """Changes with the files, the rows chosen and the weights."""
        chosen = hashlib.sha256(self._row.tobytes() + self._part.tobytes()).hexdigest()
        return " ".join([*(source.fingerprint for source in self.sources), chosen])


def _taken(rows: int, chosen: np.ndarray | None, weight: float, number: int) -> np.ndarray:
    """Row numbers that a weight takes, (taken,) int64: whole passes, then a seeded share."""
    if not weight > 0:
        raise ValueError(f"entry {number} of the mixture: weight={weight} must be above 0")
    known = np.arange(rows) if chosen is None else chosen
    if len(known) and (known.min() < 0 or known.max() >= rows):
        raise ValueError(
            f"entry {number} of the mixture: row {known.max()} is listed, but there are only "
            f"{rows} rows; was the list made for another file?"
        )
    whole, share = divmod(weight, 1.0)
    part = np.random.default_rng([_SEED, number]).permutation(known)[: round(share * len(known))]
    return np.concatenate([np.tile(known, int(whole)), np.sort(part)]).astype(np.int64)


def read_rows(path: Path) -> np.ndarray:
    """Read row numbers, one a line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is no number.
    """
    lines = path.read_text(encoding="utf-8").split()
    for number, line in enumerate(lines):
        if not line.isdecimal():
            raise ValueError(f"{path}, line {number + 1}: expected a row number, got {line!r}")
    return np.array(lines, dtype=np.int64)


def open_mixture(
    path: Path, images: str | None, open_set: Callable[[str, str | None], Source]
) -> MixtureSource:
    """Open the sets that a YAML file lists.

    Args:
        path: the file; paths in it are as anywhere else, relative to where the command runs.
        images: image folder of entries that name none.
        open_set: opens one of them by its annotations and its image folder.

    Raises:
        FileNotFoundError: the file, or one that it names, does not exist.
        ValueError: an entry has an unknown key or a wrong value.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data.annotations: no file {place(path)}")
    listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path}: expected a list of data sets, each with 'annotations'")
    parts = [_part(entry, path, number) for number, entry in enumerate(listed)]
    return MixtureSource(
        [open_set(part.annotations, part.images or images) for part in parts],
        [None if part.rows is None else read_rows(Path(part.rows)) for part in parts],
        [part.weight for part in parts],
    )


def _part(entry: Any, path: Path, number: int) -> Part:
    where = f"{path}: entry {number}"
    if not isinstance(entry, dict) or not isinstance(entry.get("annotations"), str):
        raise ValueError(f"{where}: expected a mapping with 'annotations', got {entry!r}")
    allowed = [field.name for field in fields(Part)]
    for key in entry:
        if key not in allowed:
            raise ValueError(f"{where}: {nearest('key', str(key), allowed)}")
    if Path(entry["annotations"]).suffix in (".yaml", ".yml"):
        raise ValueError(f"{where}: a mixture cannot hold another mixture; list its sets here")
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f"{where}: weight={weight!r} must be a number above 0")
    return Part(**{**entry, "weight": float(weight)})
