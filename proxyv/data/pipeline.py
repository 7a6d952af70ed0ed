"""From a row to tensors: text rendered by the template, images cut into crops by the processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from proxyv.cli import nearest
from proxyv.data.collator import Sample
from proxyv.data.images import DataError
from proxyv.data.rows import Row
from proxyv.data.templates import Rendered, Renderer
from proxyv.model.processing import ProxyVProcessor

__all__ = ["FAILURE_POLICIES", "ImagePipeline", "RowPipeline"]

FAILURE_POLICIES = ("raise", "skip")
"""What a row that cannot be used may do; see :class:`RowPipeline`."""


@dataclass(frozen=True)
class ImagePipeline:
    """How images become crops.

    Attributes:
        inputs: images to ``pixel_values`` (N, C, 3, H, W), ``num_crops`` (N,) and
            ``image_sizes`` (N, 2).
        count_crops: (height, width) of an image to its number of crops, without decoding it.
        rows_per_crop: full tokens and the newline token of a crop.

    Differs: the authors pad every image of a row with several to one crop; here each is cut as it
    would be alone. Their data has no such row.
    """

    inputs: Callable[[list[Image.Image]], dict[str, Any]]
    count_crops: Callable[[tuple[int, int]], int]
    rows_per_crop: int

    @classmethod
    def of(cls, processor: ProxyVProcessor) -> ImagePipeline:
        """A processor's way from images to crops."""
        return cls(
            inputs=processor.image_inputs,
            count_crops=lambda size_hw: processor.crop_layout(size_hw).num_crops,
            rows_per_crop=processor.rows_per_crop,
        )


class RowPipeline:
    """What turns rows into samples: a template, a way from images to crops, and limits.

    Args:
        renderer: makes ids and labels.
        images: makes crops.
        max_length: longest row in tokens; what lies beyond is cut off on the right.
        on_failure: what a row that cannot be used does (its image is missing, corrupt, too large,
            or its text is no conversation): ``raise`` stops with its name; ``skip`` gives a sample
            with the entry ``failure`` alone, which the collator leaves out and reports. No other
            row ever takes its place.

    Raises:
        ValueError: another ``on_failure``.
    """

    def __init__(
        self,
        renderer: Renderer,
        images: ImagePipeline,
        max_length: int,
        on_failure: str = "raise",
    ) -> None:
        if on_failure not in FAILURE_POLICIES:
            raise ValueError(nearest("value of on_failure", on_failure, FAILURE_POLICIES))
        self.renderer, self.images = renderer, images
        self.max_length, self.on_failure = max_length, on_failure

    def sample(self, read: Callable[[], Row]) -> Sample:
        """A row as tensors.

        Args:
            read: gives the row, or raises ``DataError``.

        Raises:
            DataError: the row cannot be used, and ``on_failure`` is ``raise``; the message names
                the row.
        """
        try:
            return self._tensors(read())
        except DataError as error:
            if self.on_failure == "raise":
                raise
            return Sample(failure=str(error))

    def count_crops(self, row: Row) -> list[int]:
        """Crops of each image of a row, from the headers of its images."""
        return [self.images.count_crops(reference.size_hw()) for reference in row.images]

    def _tensors(self, row: Row) -> Sample:
        pictures = [reference.load() for reference in row.images]
        if not pictures:
            return self._text(row, self.render(row, []))
        inputs = self.images.inputs(pictures)
        num_crops = torch.as_tensor(inputs["num_crops"], dtype=torch.long)
        sample = self._text(row, self.render(row, num_crops.tolist()))
        sample["pixel_values"] = inputs["pixel_values"]
        sample["num_crops"] = num_crops
        sample["image_sizes"] = torch.as_tensor(inputs["image_sizes"], dtype=torch.long)
        return sample

    def render(self, row: Row, num_crops: list[int]) -> Rendered:
        """Ids and labels of a row whose images have so many crops.

        Raises:
            DataError: the row fits no template, or its images do not fit the length limit.
        """
        lengths = [crops * self.images.rows_per_crop for crops in num_crops]
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
                "image); raise it or use fewer crops",
                "too long",
            )
        return rendered.cut(self.max_length)

    @staticmethod
    def _text(row: Row, rendered: Rendered) -> Sample:
        return Sample(
            where=row.where,
            input_ids=torch.tensor(rendered.input_ids, dtype=torch.long),
            labels=torch.tensor(rendered.labels, dtype=torch.long),
        )
