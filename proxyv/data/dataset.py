"""Rows as tensors: text rendered by the template, images cut into crops by the processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from proxyv.cli import nearest
from proxyv.data.collator import Sample
from proxyv.data.images import DataError
from proxyv.data.sources import Row, Source
from proxyv.data.templates import Rendered, Renderer

__all__ = ["FAILURE_POLICIES", "ConversationDataset", "DataReport", "ImagePipeline", "check_rows"]

FAILURE_POLICIES = ("raise", "skip")
"""What a row that cannot be used may do; see :class:`ConversationDataset`."""


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
        return Rendered(
            rendered.input_ids[: self.max_length], rendered.labels[: self.max_length], cut=True
        )

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
        cut: of those, rows longer than the limit.
        unsupervised: of those, rows with nothing to supervise, by what the labels say.
        tokens: mean tokens of a row.
        supervised_share: supervised tokens among all.
        first_unsupervised: where the first such row is, or None.
    """

    rows: int
    checked: int
    cut: int
    unsupervised: int
    tokens: float
    supervised_share: float
    first_unsupervised: str | None

    def lines(self) -> list[str]:
        """The report in words."""
        return [
            f"rows {self.rows:,}, checked {self.checked:,}: {self.tokens:.0f} tokens a row, "
            f"{self.supervised_share:.1%} of them supervised",
            f"rows cut at the length limit: {self.cut:,}; rows with nothing to supervise: "
            f"{self.unsupervised:,}",
        ]


def check_rows(dataset: ConversationDataset, number: int, max_unsupervised: float) -> DataReport:
    """Look at evenly spaced rows before training.

    Args:
        dataset: the rows.
        number: how many to look at; all where the set is smaller.
        max_unsupervised: largest share of rows allowed to have no supervised token.

    Raises:
        DataError: a row cannot be used, or too many have nothing to supervise.
    """
    rows = len(dataset)
    checked = min(number, rows)
    cut = unsupervised = tokens = supervised = 0
    first: str | None = None
    for step in range(checked):
        index = step * rows // checked
        rendered = dataset.rendered(index)
        tokens += len(rendered.input_ids)
        cut += rendered.cut
        supervised += rendered.num_supervised
        if not rendered.num_supervised:
            unsupervised += 1
            first = first or dataset.source[index].where
    if checked and unsupervised > max_unsupervised * checked:
        raise DataError(
            f"{unsupervised} of {checked} rows looked at have no supervised token "
            f"({unsupervised / checked:.1%}, at most {max_unsupervised:.1%} allowed by "
            f"data.max_unsupervised_share); the first is {first}; their answers lie beyond "
            f"data.max_length={dataset.max_length}"
        )
    return DataReport(
        rows=rows,
        checked=checked,
        cut=cut,
        unsupervised=unsupervised,
        tokens=tokens / max(checked, 1),
        supervised_share=supervised / max(tokens, 1),
        first_unsupervised=first,
    )
