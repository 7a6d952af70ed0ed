"""The rows of a batch inside the decoder: what each one is, which stay, and packing them anew.

Samples lose different numbers of rows, so a batch is padded again after every drop, on the side
where it was padded before. Nothing is chosen among padding, newlines or text.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from proxyv.model.head import IGNORE_INDEX

__all__ = ["Rows", "before_answers", "last_rows", "mask_of", "select"]


@dataclass(frozen=True)
class Rows:
    """What is known of the S rows that enter a decoder layer.

    Attributes:
        valid: (B, S) False where a row is padding.
        image: (B, S) True where a row is an image token, newlines not counted.
        text: (B, S) True where a row is text: neither image token, newline nor padding.
        positions: (B, S) rotary positions.
        origin: (B, S) where the row stood before any drop; only valid rows have a meaning.
        num_image: (B,) image rows before any drop.
        queries: (B, R) rows that judge the image rows, padded.
        queries_valid: (B, R) False where padding; a sample without any keeps its rows.
    """

    valid: Tensor
    image: Tensor
    text: Tensor
    positions: Tensor
    origin: Tensor
    num_image: Tensor
    queries: Tensor
    queries_valid: Tensor

    @classmethod
    def build(
        cls,
        image: Tensor,
        *,
        valid: Tensor | None = None,
        newline: Tensor | None = None,
        positions: Tensor | None = None,
        judges: Tensor | None = None,
    ) -> Rows:
        """Describe a prompt.

        Args:
            image: (B, S) True at image tokens.
            valid: (B, S) False at padding; default all real.
            newline: (B, S) True at newline tokens; default none.
            positions: (B, S); default counted over valid rows.
            judges: (B, S) True at the rows whose attention judges; default the last one, which is
                right for a prompt. ``before_answers`` gives those of a training batch.

        Raises:
            ValueError: a mask of another shape.
        """
        valid = torch.ones_like(image) if valid is None else valid.bool()
        newline = torch.zeros_like(image) if newline is None else newline
        for name, mask in (("valid", valid), ("newline", newline), ("judges", judges)):
            if mask is not None and mask.shape != image.shape:
                raise ValueError(
                    f"{name} is {tuple(mask.shape)} but image is {tuple(image.shape)}: "
                    "both must be (batch, rows)"
                )
        if positions is None:
            positions = count_positions(valid)
        image = image & valid
        judges = last_rows(valid) if judges is None else judges & valid
        most = max(1, int(judges.sum(dim=1).max()))
        queries = judges.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        origin = torch.arange(image.shape[1], device=image.device).expand_as(image)
        text = valid & ~image & ~newline
        return cls(valid, image, text, positions.expand_as(origin), origin, image.sum(dim=1),
                   queries, judges.gather(1, queries))  # fmt: skip

    @property
    def padded_right(self) -> bool:
        """Whether a sample ends in padding; else the batch is packed to the right."""
        return not bool(self.valid[:, -1].all())

    def keep(self, kept: Tensor, renumber: bool) -> tuple[Rows, Tensor]:
        """Drop rows and pad again.

        Args:
            kept: (B, S) True at rows that stay; the judging rows must stay.
            renumber: count positions anew from the first row's, instead of keeping them.

        Returns:
            The rows left, and the index (B, S') of each in the rows before; padding points at
            some row of the sample.
        """
        kept = kept & self.valid
        counts = kept.sum(dim=1)
        length = int(counts.max())
        # A stable sort brings what stays together, in order, on the side that is not padded.
        right = self.padded_right
        order = kept.int().argsort(dim=1, descending=right, stable=True)
        index = order[:, :length] if right else order[:, order.shape[1] - length :]
        valid = kept.gather(1, index)
        new_place = torch.zeros_like(self.origin).scatter(
            1, index, torch.arange(length, device=index.device).expand_as(index)
        )
        positions = self.positions.gather(1, index)
        if renumber:
            first = self.valid.int().argmax(dim=1, keepdim=True)
            positions = count_positions(valid) + self.positions.gather(1, first)
        rows = dataclasses.replace(
            self,
            valid=valid,
            image=self.image.gather(1, index) & valid,
            text=self.text.gather(1, index) & valid,
            positions=positions,
            origin=self.origin.gather(1, index),
            queries=new_place.gather(1, self.queries),
        )
        return rows, index

    def restore(self, hidden: Tensor, length: int) -> Tensor:
        """Put rows back where they stood: (B, S', D) -> (B, length, D), zeros where dropped.

        Labels and the language-model head then need to know nothing of what was dropped.
        """
        B, _, D = hidden.shape
        # Padding goes to a row behind the last, which is cut off.
        place = torch.where(self.valid, self.origin, length)
        full = hidden.new_zeros(B, length + 1, D)
        return full.scatter(1, place[..., None].expand(-1, -1, D), hidden)[:, :length]


def count_positions(valid: Tensor) -> Tensor:
    """(B, S) positions counted over valid rows, 0 at padding before them."""
    return (valid.long().cumsum(dim=1) - 1).clamp(min=0)


def last_rows(valid: Tensor) -> Tensor:
    """(B, S) True at the last valid row of each sample."""
    behind = valid.int().flip(1).cumsum(dim=1).flip(1)
    return valid & (behind == 1)


def before_answers(labels: Tensor) -> Tensor:
    """(B, S) True at the row right before each answer, one for every run of labels."""
    learned = labels != IGNORE_INDEX
    before = ~learned[:, :-1] & learned[:, 1:]
    return torch.nn.functional.pad(before, (0, 1), value=False)


def select(scores: Tensor, rows: Rows, keep: Tensor) -> Tensor:
    """Which rows stay: the image rows with the highest scores, and everything that is no image.

    Args:
        scores: (B, S); of equal ones the first wins.
        rows: what the rows are.
        keep: (B,) image rows to keep; more than there are keeps all.

    Returns:
        (B, S) True where a row stays; padding never does. A sample that nothing judges keeps
        all rows.
    """
    ranked = scores.float().masked_fill(~rows.image, -torch.inf)
    rank = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    judged = rows.queries_valid.any(dim=1, keepdim=True)
    dropped = rows.image & (rank >= keep[:, None]) & judged
    return rows.valid & ~dropped


def mask_of(index: Tensor, length: int) -> Tensor:
    """(N, k) indices -> (N, length) bool, True at them."""
    mask = torch.zeros(index.shape[0], length, dtype=torch.bool, device=index.device)
    return mask.scatter(1, index, True)
