"""One row as the model sees it: crops, tokens, and which of them are supervised."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.text import Text

from proxyv.data.pipeline import RowPipeline
from proxyv.data.rows import Row
from proxyv.data.templates import IGNORE_INDEX, Rendered

__all__ = ["Inspection", "Run", "inspect_row", "save_crops"]

STYLES = {"supervised": "bold green", "prompt": "default", "image": "cyan"}
"""Colours of the kinds of run."""


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind.

    Attributes:
        kind: ``image``, ``supervised`` or ``prompt``.
        ids: the tokens.
        text: what they read as; of an image, how many they are.
    """

    kind: str
    ids: list[int]
    text: str


@dataclass(frozen=True)
class Inspection:
    """A row as the model sees it.

    Attributes:
        where: file, row number and id.
        subset: the part of the set that it belongs to.
        sizes_hw: height and width of each image.
        num_crops: crops of each image.
        runs: the tokens, in order.
        rendered: ids and labels, after any cut.
    """

    where: str
    subset: str
    sizes_hw: list[tuple[int, int]]
    num_crops: list[int]
    runs: list[Run]
    rendered: Rendered

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "where": self.where,
            "subset": self.subset,
            "image_sizes_hw": [list(size) for size in self.sizes_hw],
            "crops": self.num_crops,
            "tokens": len(self.rendered.input_ids),
            "supervised": self.rendered.num_supervised,
            "hidden": self.rendered.hidden,
            "runs": [
                {"kind": run.kind, "tokens": len(run.ids), "text": run.text} for run in self.runs
            ],
            "input_ids": self.rendered.input_ids,
            "labels": self.rendered.labels,
        }

    def header(self) -> list[str]:
        """The row in a few lines."""
        total, supervised = len(self.rendered.input_ids), self.rendered.num_supervised
        lines = [f"{self.where}, part {self.subset!r}"]
        pairs = zip(self.sizes_hw, self.num_crops, strict=True)
        for number, ((height, width), crops) in enumerate(pairs):
            lines.append(
                f"image {number}: {height} x {width} pixels (height x width), {crops} "
                f"crop{'s' * (crops != 1)}"
            )
        lines.append(f"{total:,} tokens, {supervised:,} supervised ({supervised / total:.1%})")
        if self.rendered.hidden:
            lines.append(
                f"CUT at the length limit: {self.rendered.hidden:,} supervised tokens are lost"
            )
        return lines

    def text(self) -> Text:
        """The tokens in colour; brackets mark the supervised ones where colours are missing."""
        shown = Text()
        for run in self.runs:
            text = f"⟦{run.text}⟧" if run.kind == "supervised" else run.text
            shown.append(text, STYLES[run.kind])
        return shown


def inspect_row(row: Row, pipeline: RowPipeline, tokenizer: Any) -> Inspection:
    """Look at a row.

    Raises:
        DataError: the row cannot be used.
    """
    crops = pipeline.count_crops(row)
    rendered = pipeline.render(row, crops)
    image_id = pipeline.renderer.image_token_id

    def kind(pair: tuple[int, int]) -> str:
        token, label = pair
        if token == image_id:
            return "image"
        return "prompt" if label == IGNORE_INDEX else "supervised"

    runs = []
    pairs = zip(rendered.input_ids, rendered.labels, strict=True)
    for name, members in groupby(pairs, key=kind):
        ids = [token for token, _ in members]
        text = f"[{len(ids)} image tokens]" if name == "image" else tokenizer.decode(ids)
        runs.append(Run(name, ids, text))
    sizes = [reference.size_hw() for reference in row.images]
    return Inspection(row.where, row.subset, sizes, crops, runs, rendered)


def save_crops(row: Row, pipeline: RowPipeline, folder: Path, mean: Any, std: Any) -> list[Path]:
    """Write every crop of a row as a picture.

    Args:
        row: the row.
        pipeline: what cuts its images.
        folder: where pictures go; made where it is not there.
        mean: (3,) of the normalisation, to be undone.
        std: (3,) likewise.

    Returns:
        The files, by image and crop.
    """
    if not row.images:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    inputs = pipeline.images.inputs([reference.load() for reference in row.images])
    files = []
    for number, (pixels, count) in enumerate(
        zip(inputs["pixel_values"], inputs["num_crops"], strict=True)
    ):
        for crop in range(int(count)):
            values = pixels[crop].numpy().transpose(1, 2, 0) * np.array(std) + np.array(mean)
            path = folder / f"image{number}_crop{crop}.png"
            Image.fromarray((values * 255).round().clip(0, 255).astype(np.uint8)).save(path)
            files.append(path)
    return files
