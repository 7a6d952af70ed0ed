"""RefCOCO: "guy petting elephant" -> the box of that person, as "[left, top, right, bottom]".

Grounding: a sentence describes one thing in a photograph, and its bounding box is asked for, as
fractions of the width and height of the image. Test A holds people,
test B other things; every sentence of an object is a question (5,657 and 5,095). A box is right if
its intersection over union with the true one is at least 0.5.

Source: lmms-eval 0.7.3, tasks refcoco_bbox_rec_testA and refcoco_bbox_rec_testB. Differs: a
flipped box whose area cancels the true one has overlap 0 and is no error. The average of both
parts is ours (`proxyv.eval.benchmarks.GROUPS`).
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from proxyv.eval.benchmarks.base import (
    Benchmark,
    Record,
    Sample,
    Score,
    mean_score,
    optional_text,
    text_cell,
)
from proxyv.eval.metrics import Box, box_iou, center_inside, final_answer, read_box

__all__ = ["RefCOCO", "RefCOCOTestA", "RefCOCOTestB"]

THRESHOLD = 0.5
LARGEST_PX = 1e9  # far beyond any image, and well within single precision
REQUEST = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right "
    "x, bottom-right y). All values are floating point numbers bounded between 0 and 1. Please "
    "provide the bounding box coordinate of the region this sentence describes: "
)


class RefCOCO(Benchmark):
    """Boxes of things that a sentence describes; one of two parts."""

    folder = "refcoco"
    repositories = ("lmms-lab-encoder/RefCOCO", "lmms-lab/RefCOCO")
    columns = ("question_id", "image", "answer", "bbox")
    max_new_tokens = 1024
    id_column = "question_id"
    main_score = "refcoco_ACC@0.5"
    needs_image_size = True

    def questions(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Each sentence is a question of its own."""
        sentences = row.get("answer")
        if not isinstance(sentences, list | tuple) or not sentences:
            return [{}]  # `sample` says what is wrong with it
        return [{"answer": sentence} for sentence in sentences]

    def sample(self, index: int, row: Mapping[str, Any]) -> Sample:
        """Make the question of a row; the reference is still in pixels, as x, y, width, height."""
        sentence = text_cell(row, "answer")
        return Sample(
            question_id=self.question_id(index, row),
            question=sentence,
            prompt=REQUEST + sentence,
            references=(json.dumps(_pixels(row.get("bbox"))),),
            document=optional_text(row.get("file_name")),
        )

    def with_image_size(self, sample: Sample, size_hw: tuple[int, int]) -> Sample:
        """Turn the reference into corners, as fractions of the image."""
        x, y, width, height = json.loads(sample.references[0])
        image_height, image_width = size_hw
        corners = (
            *(x / image_width, y / image_height),
            *((x + width) / image_width, (y + height) / image_height),
        )
        fractions = [_single(value) for value in corners]
        return dataclasses.replace(sample, references=(json.dumps(fractions),))

    def score(
        self, answer: str, references: Sequence[str], details: Mapping[str, Any] | None = None
    ) -> float:
        """Whether the box overlaps the true one by half or more."""
        return float(box_iou(read_box(answer.strip()), _truth(references)) >= THRESHOLD)

    def scores(self, records: Sequence[Record]) -> dict[str, Score]:
        """Mean overlap, accuracy at five thresholds, and how often the centre is inside."""
        pairs = [
            (read_box(final_answer(record["answer"])), _truth(record["references"]))
            if record["error"] is None
            else None
            for record in records
        ]

        def over(measure: Callable[[Box, Box], float]) -> Score:
            return mean_score([0.0 if pair is None else measure(*pair) for pair in pairs])

        def at(threshold: float) -> Score:
            return over(lambda box, truth: float(box_iou(box, truth) >= threshold))

        accuracies = {f"refcoco_ACC@{level}": at(level) for level in (0.5, 0.1, 0.3, 0.7, 0.9)}
        overlap = {"refcoco_IoU": over(box_iou), "refcoco_Center_ACC": over(center_inside)}
        return accuracies | overlap


class RefCOCOTestA(RefCOCO):
    """People."""

    name = "refcoco_testA"
    split = "testA"


class RefCOCOTestB(RefCOCO):
    """Other things."""

    name = "refcoco_testB"
    split = "testB"


def _pixels(box: Any) -> list[float]:
    """The four numbers of a box.

    Raises:
        ValueError: it holds anything else, or numbers that no image has.
    """
    problem = f"column 'bbox' holds {box!r}, four numbers x, y, w, h are needed"
    if not isinstance(box, list | tuple) or len(box) != 4:
        raise ValueError(problem)
    try:
        numbers = [float(value) for value in box]
    except (TypeError, ValueError) as error:
        raise ValueError(problem) from error
    if not all(abs(number) < LARGEST_PX for number in numbers):  # not-a-number is not, either
        raise ValueError(problem)
    return numbers


def _truth(references: Sequence[str]) -> Box:
    return cast(Box, tuple(json.loads(references[0])))


def _single(value: float) -> float:
    """Round to single precision, in which the harness keeps the true boxes."""
    return struct.unpack("f", struct.pack("f", value))[0]
