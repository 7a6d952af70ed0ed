"""A look at every row before training: lengths for the sampler, counts for the report.

Only headers of images are read. The table is kept in a file whose name says what it was made of,
so that the next run, and every other rank, reads it in no time. Rows that could not be used are
looked at again by each of them: an image that was missing may be there now.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from proxyv.data.dataset import FACTS, ConversationDataset

__all__ = ["ScanStopped", "scan_rows"]

_BATCH = 256


class ScanStopped(Exception):
    """A look at the rows was broken off; what it had found is kept for the next one."""


class _Measured(Dataset[tuple[int, int, int, int, bool]]):
    """A dataset whose items are the facts of some of its rows."""

    def __init__(self, dataset: ConversationDataset, rows: np.ndarray) -> None:
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, int, int, int, bool]:
        return self.dataset.measure(int(self.rows[index]))


def _table(facts: list[Any]) -> np.ndarray:
    return np.array(facts, dtype=FACTS)


def scan_rows(
    dataset: ConversationDataset,
    workers: int = 0,
    cache: Path | None = None,
    *,
    start_worker: Callable[[int], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """Measure every row.

    Args:
        dataset: the rows.
        workers: processes that work on it; 0 works in this one.
        cache: folder that tables are kept in; None keeps none. In a run of several ranks one scans
            and the others wait, then call this too and find the table.
        start_worker: called in each of the processes before it works.
        stopped: asked now and then whether to break off.

    Returns:
        (rows,) of :data:`proxyv.data.dataset.FACTS`. For the sampler: ``lengths=table["tokens"]``,
        ``has_image=table["images"] > 0``.

    Raises:
        ScanStopped: it was broken off.
    """
    path = None if cache is None else cache / f"rows-{_fingerprint(dataset)}.npy"
    if path is not None and path.is_file():
        table = np.load(path, allow_pickle=False)
    else:
        table = np.zeros(len(dataset), FACTS)
        table["failed"] = True  # until it has been looked at
    rows = np.flatnonzero(table["failed"])
    loader = DataLoader(
        _Measured(dataset, rows),
        batch_size=_BATCH,
        num_workers=workers if len(rows) > _BATCH else 0,
        collate_fn=_table,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # a run draws the same numbers whether it finds a table or not
    )
    done = 0
    for facts in loader:
        table[rows[done : done + len(facts)]] = facts
        done += len(facts)
        if stopped():
            break
    if path is not None and not table["failed"][rows[:done]].all():
        _save(table, path)
    if done < len(rows):
        raise ScanStopped(f"broken off after {done:,} of {len(rows):,} rows")
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
    """Name of what decides on the facts: rows, image folder, template, crops and length limit.

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
        dataset.images.rows_per_crop,
        crops,
    )
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


_SIDES = (20, 60, 168, 336, 400, 672, 800, 1344, 3000)
