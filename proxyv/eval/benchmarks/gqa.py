"""GQA: "Is it overcast?" -> "no".

Questions made from scene graphs of photographs, about objects, attributes and relations; 12,578
balanced test-dev questions on 398 images, which a second table holds. Scored by exact match
without case and punctuation.

Source: lmms-eval 0.7.3, task gqa. Differs: no.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxyv.eval.benchmarks.base import (
    Benchmark,
    ImageTable,
    Sample,
    optional_text,
    text_cell,
)
from proxyv.eval.metrics import exact_match

__all__ = ["GQA"]


class GQA(Benchmark):
    """Questions about scenes, whose images are in a table of their own."""

    name = "gqa"
    repositories = ("lmms-lab-encoder/GQA", "lmms-lab/GQA")
    config = "testdev_balanced_instructions"
    split = "testdev"
    columns = ("id", "imageId", "question", "answer")
    image_table = ImageTable("testdev_balanced_images", "imageId", "id")
    max_new_tokens = 16
    id_column = "id"
    main_score = "exact_match"

    def sample(self, index: int, row: Mapping[str, Any]) -> Sample:
        """Make the question of a row (see the base class)."""
        question = text_cell(row, "question")
        return Sample(
            question_id=self.question_id(index, row),
            question=question,
            prompt=f"{question}\nAnswer the question using a single word or phrase.",
            references=(text_cell(row, "answer"),),
            document=optional_text(row.get("imageId")),
        )

    def score(
        self, answer: str, references: Sequence[str], details: Mapping[str, Any] | None = None
    ) -> float:
        """Equality without case and punctuation."""
        return exact_match(answer, references[0])
