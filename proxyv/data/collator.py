"""Rows to a batch: right padding, and no token lost because it happens to equal the padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from proxyv.data.templates import IGNORE_INDEX

__all__ = ["Collator", "DummyImage", "Sample"]


class Sample(TypedDict, total=False):
    """What the dataset gives for one row; the image entries are absent in a text-only row."""

    input_ids: Tensor
    """(S,) token ids."""
    labels: Tensor
    """(S,) token ids, ``IGNORE_INDEX`` where nothing is supervised."""
    pixel_values: Tensor
    """(N, C, 3, H, W) crops of the row's images, zero crops where an image has fewer."""
    num_crops: Tensor
    """(N,) real crops of each image."""
    image_sizes: Tensor
    """(N, 2) height and width of each image before any resizing."""
    where: str
    """File, row number and id, for messages."""
    failure: str
    """Where a row that cannot be used is, and why; such a row has no other entry."""


@dataclass(frozen=True)
class DummyImage:
    """A black crop that stands behind the text of a batch without images.

    Ranks that train together must run the same modules in the same order: DeepSpeed's ZeRO adds up
    gradients in the order in which they appear. The crop comes after all the text of its row, so
    by causality no text sees it, and it carries no label: loss and gradients stay what they were.

    Source: authors' zero image for text-only rows. Differs: one crop for a whole batch, and only
    where it has no image.

    Attributes:
        image_token_id: id of the image token.
        tokens: tokens of one crop, its newline included.
        crop_px: side of a crop in pixels.
    """

    image_token_id: int
    tokens: int
    crop_px: int

    def add_to(self, sample: Sample) -> Sample:
        """The row with the crop behind it."""
        ids, labels = sample["input_ids"], sample["labels"]
        return Sample(
            input_ids=torch.cat([ids, ids.new_full((self.tokens,), self.image_token_id)]),
            labels=torch.cat([labels, labels.new_full((self.tokens,), IGNORE_INDEX)]),
            pixel_values=torch.zeros(1, 1, 3, self.crop_px, self.crop_px),
            num_crops=torch.tensor([1]),
            image_sizes=torch.tensor([[self.crop_px, self.crop_px]]),
        )


class Collator:
    """Pads rows on the right and stacks their images in order.

    Example: rows ``[5, 6, 0]`` and ``[7]`` with padding id 0 become ids
    ``[[5, 6, 0], [7, 0, 0]]`` and mask ``[[1, 1, 1], [1, 0, 0]]``: the mask comes from the
    lengths, so the real 0 of the first row stays.

    Rows that failed (policy ``skip`` of the dataset) are left out, so B is smaller; where all
    failed, one token without a label stands for them, and the batch adds nothing to the loss.

    Args:
        pad_token_id: id to pad with; any id will do.
        dummy: given to a batch without images; None leaves such a batch as it is.
        describe: add ``rows`` and ``failures`` to a batch. They are no model inputs: whoever asks
            for them takes them out (``batch.pop``) before the model sees the batch.
    """

    def __init__(
        self, pad_token_id: int, dummy: DummyImage | None = None, describe: bool = False
    ) -> None:
        self.pad_token_id, self.dummy, self.describe = pad_token_id, dummy, describe

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Make a batch.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` (B, S); and, where a row has images,
            ``pixel_values`` (N, C, 3, H, W), ``num_crops`` (N,), ``image_sizes`` (N, 2) of all
            images of the batch in row order. With ``describe`` also two lists of strings:
            ``rows``, where each row of the batch comes from, and ``failures``, a message for each
            row left out, which begins with where it comes from.
        """
        failures = [sample["failure"] for sample in samples if "failure" in sample]
        samples = [sample for sample in samples if "failure" not in sample] or [self._nothing()]
        batch: dict[str, Any] = dict(self._tensors(samples))
        if self.describe:
            batch["rows"] = [sample.get("where", "") for sample in samples]
            batch["failures"] = failures
        return batch

    def _nothing(self) -> Sample:
        """A row of one token that nothing is learned from."""
        return Sample(
            input_ids=torch.tensor([self.pad_token_id]), labels=torch.tensor([IGNORE_INDEX])
        )

    def _tensors(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        if self.dummy is not None and not any("pixel_values" in sample for sample in samples):
            shortest = min(range(len(samples)), key=lambda row: len(samples[row]["input_ids"]))
            samples = list(samples)
            samples[shortest] = self.dummy.add_to(samples[shortest])
        ids = [sample["input_ids"] for sample in samples]
        shape = (len(ids), max(len(row) for row in ids))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORE_INDEX, dtype=torch.long),
        }
        for number, sample in enumerate(samples):
            length = len(sample["input_ids"])
            batch["input_ids"][number, :length] = sample["input_ids"]
            batch["attention_mask"][number, :length] = 1
            batch["labels"][number, :length] = sample["labels"]
        with_images = [sample for sample in samples if "pixel_values" in sample]
        if with_images:
            batch["pixel_values"] = _stack([sample["pixel_values"] for sample in with_images])
            batch["num_crops"] = torch.cat([sample["num_crops"] for sample in with_images])
            batch["image_sizes"] = torch.cat([sample["image_sizes"] for sample in with_images])
        return batch


def _stack(pixels: list[Tensor]) -> Tensor:
    """Join (n_i, C_i, 3, H, W) to (sum n_i, max C_i, 3, H, W), filling up with zero crops."""
    most = max(part.shape[1] for part in pixels)
    if all(part.shape[1] == most for part in pixels):
        return torch.cat(pixels)
    joined = pixels[0].new_zeros(sum(len(part) for part in pixels), most, *pixels[0].shape[2:])
    start = 0
    for part in pixels:
        joined[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return joined
