"""Rows as tensors by number, and what a look at them before training finds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from torch.utils.data import Dataset

from proxyv.data.collator import Sample
from proxyv.data.images import DataError
from proxyv.data.pipeline import ImagePipeline, RowPipeline
from proxyv.data.readers import Source
from proxyv.data.templates import Rendered, Renderer

__all__ = [
    "FACTS",
    "ConversationDataset",
    "DataReport",
    "check_rows",
    "report_rows",
]

FACTS = np.dtype(
    [
        ("tokens", np.int32),
        ("supervised", np.int32),
        ("hidden", np.int32),
        ("images", np.int16),
        ("failed", np.bool_),
    ]
)
"""What is known of a row without its pixels: tokens (images included), supervised tokens, tokens of
answers that the length limit cut off, images, and whether the row cannot be used."""


class ConversationDataset(RowPipeline, Dataset[Sample]):
    """A source with a template and an image pipeline.

    Args:
        source: the rows.
        renderer: makes ids and labels.
        images: makes crops.
        max_length: longest row in tokens; what lies beyond is cut off on the right.
        limit: use only the first rows; None uses all.
        on_failure: ``raise`` or ``skip``, see :class:`RowPipeline`.
    """

    def __init__(
        self,
        source: Source,
        renderer: Renderer,
        images: ImagePipeline,
        max_length: int,
        limit: int | None = None,
        on_failure: str = "raise",
    ) -> None:
        super().__init__(renderer, images, max_length, on_failure)
        self.source = source
        self._length = len(source) if limit is None else min(limit, len(source))

    def __len__(self) -> int:
        """Number of rows."""
        return self._length

    def __getitem__(self, index: int) -> Sample:
        """One row as tensors; see :meth:`RowPipeline.sample`."""
        return self.sample(lambda: self.source[index])

    def rendered(self, index: int) -> Rendered:
        """Ids and labels of a row, reading no more of its images than their headers."""
        row = self.source[index]
        return self.render(row, self.count_crops(row))

    def measure(self, index: int) -> tuple[int, int, int, int, bool]:
        """The row's entry in a table of :data:`FACTS`; never raises for a row that fails."""
        try:
            row = self.source[index]
            done = self.render(row, self.count_crops(row))
        except DataError:
            return 0, 0, 0, 0, True
        return len(done.input_ids), done.num_supervised, done.hidden, len(row.images), False


@dataclass(frozen=True)
class DataReport:
    """What a look at the rows before training found.

    Attributes:
        rows: rows in the set.
        checked: rows looked at.
        failed: of those, rows that cannot be used.
        cut: of those, rows longer than the limit whose answers lost tokens.
        hidden: supervised tokens that those rows lost.
        unsupervised: of those, rows with nothing left to supervise.
        tokens: mean tokens of a row.
        supervised_share: supervised tokens among all.
    """

    rows: int
    checked: int
    failed: int
    cut: int
    hidden: int
    unsupervised: int
    tokens: float
    supervised_share: float

    def lines(self) -> list[str]:
        """The report in words."""
        return [
            f"rows {self.rows:,}, checked {self.checked:,}: {self.tokens:.0f} tokens a row, "
            f"{self.supervised_share:.1%} of them supervised",
            f"rows cut at the length limit: {self.cut:,} ({self.hidden:,} tokens of answers lost); "
            f"rows with nothing to supervise: {self.unsupervised:,}; rows that cannot be used: "
            f"{self.failed:,}",
        ]


def check_rows(dataset: ConversationDataset, number: int, max_unsupervised: float) -> DataReport:
    """Look at evenly spaced rows before training; of a streamed set, at evenly spaced blocks.

    Args:
        dataset: the rows.
        number: how many to look at; all where the set is smaller.
        max_unsupervised: largest share of rows allowed to have no supervised token.

    Raises:
        DataError: as :func:`report_rows`.
    """
    indices = _spread(len(dataset), min(number, len(dataset)), dataset.source.blocks)
    facts = np.array([dataset.measure(index) for index in indices], dtype=FACTS)
    return report_rows(dataset, facts, max_unsupervised, indices)


def _spread(rows: int, number: int, blocks: np.ndarray | None) -> list[int]:
    """So many row numbers from all over a set; whole blocks of them where it has blocks."""
    if blocks is None:
        return [step * rows // number for step in range(number)]
    starts = np.flatnonzero(np.diff(blocks[:rows], prepend=-1))
    wanted = max(math.ceil(number * len(starts) / rows), 1)
    chosen = {int(blocks[starts[step * len(starts) // wanted]]) for step in range(wanted)}
    return np.flatnonzero(np.isin(blocks[:rows], list(chosen)))[:number].tolist()


def report_rows(
    dataset: ConversationDataset,
    facts: np.ndarray,
    max_unsupervised: float,
    indices: Sequence[int] | None = None,
) -> DataReport:
    """Sum up a table of rows, and refuse to go on where too many teach nothing.

    Args:
        dataset: the rows.
        facts: (looked at,) of :data:`FACTS`, from ``measure`` or ``scan_rows``.
        max_unsupervised: largest share of usable rows allowed to have no supervised token.
        indices: row number of each entry; None where the table has every row.

    Raises:
        DataError: a row cannot be used and the dataset does not skip such rows, no row can be used
            at all, or too many have nothing to supervise; the message names the first.
    """
    numbers = np.arange(len(facts)) if indices is None else np.asarray(indices)
    used = facts[~facts["failed"]]
    if len(used) < len(facts) and (dataset.on_failure == "raise" or not len(used)):
        _refuse(dataset, int(numbers[facts["failed"].argmax()]), len(facts) - len(used), len(facts))
    empty = ~facts["failed"] & (facts["supervised"] == 0)
    unsupervised, tokens = int(empty.sum()), int(used["tokens"].sum())
    if unsupervised > max_unsupervised * len(used):
        first = dataset.source[int(numbers[empty.argmax()])].where
        raise DataError(
            f"{unsupervised} of {len(used)} rows looked at have no supervised token "
            f"({unsupervised / len(used):.1%}, at most {max_unsupervised:.1%} allowed by "
            f"data.max_unsupervised_share); the first is {first}; their answers lie beyond "
            f"data.max_length={dataset.max_length}"
        )
    return DataReport(
        rows=len(dataset),
        checked=len(facts),
        failed=len(facts) - len(used),
        cut=int((used["hidden"] > 0).sum()),
        hidden=int(used["hidden"].sum()),
        unsupervised=unsupervised,
        tokens=tokens / max(len(used), 1),
        supervised_share=int(used["supervised"].sum()) / max(tokens, 1),
    )


def _refuse(dataset: ConversationDataset, index: int, failed: int, looked_at: int) -> NoReturn:
    """Raise a ``DataError`` about a row that could not be used when the rows were looked at."""
    none = "" if failed < looked_at else f"none of the {looked_at} rows looked at can be used; "
    try:
        dataset.rendered(index)
    except DataError as error:
        if dataset.on_failure == "raise":
            raise
        raise DataError(f"{none}the first: {error}", error.kind) from error
    raise DataError(
        f"{none}row {index} could not be used when it was looked at, and can be now: start again"
    )
