"""A look at every row before training: lengths for the sampler, counts for the report.

Only headers of images are read. The table is kept in a file whose name says what it was made of,
so that the next run, and every other rank, reads it in no time.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from proxyv.data.dataset import FACTS, ConversationDataset

__all__ = ["scan_rows"]


class _Measured(Dataset[tuple[int, int, int, int, bool]]):
    """A dataset whose items are the facts of its rows."""

    def __init__(self, dataset: ConversationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, int, int, int, bool]:
        return self.dataset.measure(index)


def _table(facts: list[Any]) -> np.ndarray:
    return np.array(facts, dtype=FACTS)


def scan_rows(
    dataset: ConversationDataset, workers: int = 0, cache: Path | None = None
) -> np.ndarray:
    """Measure every row.

    Args:
        dataset: the rows.
        workers: processes that work on it; 0 works in this one.
        cache: folder that tables are kept in; None keeps none. In a run of several ranks one scans
            and the others wait, then call this too and find the table.

    Returns:
        (rows,) of :data:`proxyv.data.dataset.FACTS`. For the sampler: ``lengths=table["tokens"]``,
        ``has_image=table["images"] > 0``.
    """
    path = None if cache is None else cache / f"rows-{_fingerprint(dataset)}.npy"
    if path is not None and path.is_file():
        return np.load(path, allow_pickle=False)
    loader = DataLoader(_Measured(dataset), batch_size=256, num_workers=workers, collate_fn=_table)
    table = np.concatenate([np.empty(0, FACTS), *loader])
    if path is not None:
        _save(table, path)
    return table


def _save(table: np.ndarray, path: Path) -> None:
    """Write a table so that a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        try:
            np.save(file, table)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def _fingerprint(dataset: ConversationDataset) -> str:
    """Name of what decides on the facts: rows, template, vocabulary, crops and length limit.

    How images are cut is known by trying it on sizes of all shapes. Images replaced by others of
    another size go unnoticed: remove the table then.
    """
    sizes = [(height, width) for height in _SIDES for width in _SIDES]
    crops = [dataset.images.count_crops(size) for size in sizes]
    known = (
        dataset.source.fingerprint,
        len(dataset),
        dataset.renderer.fingerprint,
        dataset.max_length,
        dataset.images.tokens_per_crop,
        crops,
    )
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


_SIDES = (20, 60, 168, 336, 400, 672, 800, 1344, 3000)
