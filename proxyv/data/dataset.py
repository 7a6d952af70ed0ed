"""Rows as tensors: text rendered by the template, images cut into crops by the processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from proxyv.cli import nearest
from proxyv.data.collator import Sample
from proxyv.data.images import DataError
from proxyv.data.sources import Row, Source
from proxyv.data.templates import Rendered, Renderer

__all__ = [
    "FACTS",
    "FAILURE_POLICIES",
    "ConversationDataset",
    "DataReport",
    "ImagePipeline",
    "check_rows",
    "report_rows",
]

FAILURE_POLICIES = ("raise", "skip")
"""What a row that cannot be used may do; see :class:`ConversationDataset`."""

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


@dataclass(frozen=True)
class ImagePipeline:
    """How images become crops.

    Attributes:
        inputs: images to ``pixel_values`` (N, C, 3, H, W), ``num_crops`` (N,) and
            ``image_sizes`` (N, 2).
        count_crops: (height, width) of an image to its number of crops, without decoding it.
        tokens_per_crop: s * s full tokens and one newline token.
    """

    inputs: Callable[[list[Image.Image]], dict[str, Any]]
    count_crops: Callable[[tuple[int, int]], int]
    tokens_per_crop: int


class ConversationDataset(Dataset[Sample]):
    """A source with a template and an image pipeline.

    Args:
        source: the rows.
        renderer: makes ids and labels.
        images: makes crops.
        max_length: longest row in tokens; what lies beyond is cut off on the right.
        limit: use only the first rows; None uses all.
        on_failure: what a row that cannot be used does (its image is missing, corrupt, too large,
            or its text is no conversation): ``raise`` stops with its name; ``skip`` gives a sample
            with the entry ``failure`` alone, which the collator leaves out and reports. No other
            row ever takes its place.

    Raises:
        ValueError: another ``on_failure``.
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
        if on_failure not in FAILURE_POLICIES:
            raise ValueError(nearest("value of on_failure", on_failure, FAILURE_POLICIES))
        self.on_failure = on_failure
        self.source, self.renderer, self.images = source, renderer, images
        self.max_length = max_length
        self._length = len(source) if limit is None else min(limit, len(source))

    def __len__(self) -> int:
        """Number of rows."""
        return self._length

    def __getitem__(self, index: int) -> Sample:
        """One row as tensors.

        Raises:
            DataError: the row cannot be used, and ``on_failure`` is ``raise``; the message names
                the row.
        """
        try:
            return self._tensors(self.source[index])
        except DataError as error:
            if self.on_failure == "raise":
                raise
            return Sample(failure=str(error))

    def _tensors(self, row: Row) -> Sample:
        pictures = [reference.load() for reference in row.images]
        if not pictures:
            return self._text(row, self._render(row, []))
        inputs = self.images.inputs(pictures)
        num_crops = torch.as_tensor(inputs["num_crops"], dtype=torch.long)
        sample = self._text(row, self._render(row, num_crops.tolist()))
        sample["pixel_values"] = inputs["pixel_values"]
        sample["num_crops"] = num_crops
        sample["image_sizes"] = torch.as_tensor(inputs["image_sizes"], dtype=torch.long)
        return sample

    def rendered(self, index: int) -> Rendered:
        """Ids and labels of a row, reading no more of its images than their headers."""
        row = self.source[index]
        crops = [self.images.count_crops(reference.size_hw()) for reference in row.images]
        return self._render(row, crops)

    def measure(self, index: int) -> tuple[int, int, int, int, bool]:
        """The row's entry in a table of :data:`FACTS`; never raises for a row that fails."""
        try:
            row = self.source[index]
            crops = [self.images.count_crops(reference.size_hw()) for reference in row.images]
            done = self._render(row, crops)
        except DataError:
            return 0, 0, 0, 0, True
        return len(done.input_ids), done.num_supervised, done.hidden, len(crops), False

    def _render(self, row: Row, num_crops: list[int]) -> Rendered:
        lengths = [crops * self.images.tokens_per_crop for crops in num_crops]
        try:
            rendered = self.renderer.render(row.turns, lengths)
        except ValueError as error:
            raise DataError(f"{row.where}: {error}") from error
        if len(rendered.input_ids) <= self.max_length:
            return rendered
        image_id = self.renderer.image_token_id
        if lengths and image_id in rendered.input_ids[self.max_length :]:
            raise DataError(
                f"{row.where}: {len(rendered.input_ids)} tokens, {sum(lengths)} of them of images, "
                f"do not fit data.max_length={self.max_length} (cutting would lose part of an "
                "image); raise it or use fewer crops"
            )
        return rendered.cut(self.max_length)

    @staticmethod
    def _text(row: Row, rendered: Rendered) -> Sample:
        return Sample(
            where=row.where,
            input_ids=torch.tensor(rendered.input_ids, dtype=torch.long),
            labels=torch.tensor(rendered.labels, dtype=torch.long),
        )


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
        first_unsupervised: where the first such row is, or None.
    """

    rows: int
    checked: int
    failed: int
    cut: int
    hidden: int
    unsupervised: int
    tokens: float
    supervised_share: float
    first_unsupervised: str | None

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
    """Look at evenly spaced rows before training.

    Args:
        dataset: the rows.
        number: how many to look at; all where the set is smaller.
        max_unsupervised: largest share of rows allowed to have no supervised token.

    Raises:
        DataError: as :func:`report_rows`.
    """
    rows = len(dataset)
    checked = min(number, rows)
    indices = [step * rows // checked for step in range(checked)]
    facts = np.array([dataset.measure(index) for index in indices], dtype=FACTS)
    return report_rows(dataset, facts, max_unsupervised, indices)


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
        DataError: a row cannot be used and the dataset does not skip such rows, or too many have
            nothing to supervise; the message names the first.
    """
    numbers = np.arange(len(facts)) if indices is None else np.asarray(indices)
    if facts["failed"].any() and dataset.on_failure == "raise":
        dataset.rendered(int(numbers[facts["failed"].argmax()]))  # raises, with the reason
    used = facts[~facts["failed"]]
    empty = ~facts["failed"] & (facts["supervised"] == 0)
    unsupervised, tokens = int(empty.sum()), int(used["tokens"].sum())
    first = dataset.source[int(numbers[empty.argmax()])].where if unsupervised else None
    if unsupervised > max_unsupervised * len(used):
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
        first_unsupervised=first,
    )
