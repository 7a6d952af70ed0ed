"""SEED-Bench image: "How many towels are in the image?" A. One B. Two C. Three D. Four -> "A".

Multiple-choice questions about photographs, of nine kinds; about 14,200 of the 18,000 rows (the
others show videos). The first character of the answer counts.

Source: lmms-eval 0.7.3, task seedbench, metric seed_image. Differs: videos are not asked, and
the harness's file to submit is not written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxyv.eval.benchmarks.base import (
    Benchmark,
    Sample,
    optional_text,
    text_cell,
)
from proxyv.eval.metrics import first_letter_match

__all__ = ["SEEDBench"]

CHOICES = {"A": "choice_a", "B": "choice_b", "C": "choice_c", "D": "choice_d"}


class SEEDBench(Benchmark):
    """Multiple-choice questions about images."""

    name = "seedbench"
    repositories = ("lmms-lab-encoder/SEED-Bench", "lmms-lab/SEED-Bench")
    split = "test"
    columns = ("answer", *CHOICES.values(), "data_type", "question", "question_id", "image")
    kind_column = "question_type_id"
    max_new_tokens = 1024
    id_column = "question_id"
    main_score = "seed_image"

    def questions(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Only images."""
        return [{}] if row.get("data_type") == "image" else []

    def images(self, row: Mapping[str, Any]) -> list[Any]:
        """The list of images of a row, one for this part of the data."""
        cell = row.get("image")
        return list(cell) if isinstance(cell, list | tuple) else [cell]

    def sample(self, index: int, row: Mapping[str, Any]) -> Sample:
        """Make the question of a row (see the base class)."""
        question = text_cell(row, "question")
        missing = [column for column in CHOICES.values() if row.get(column) is None]
        if missing:
            raise ValueError(f"column {missing[0]!r} holds nothing, a choice is needed")
        options = [f"{letter}. {row[column]}" for letter, column in CHOICES.items()]
        instruction = "Answer with the option's letter from the given choices directly."
        return Sample(
            question_id=self.question_id(index, row),
            question=question,
            prompt="\n".join([question, *options, instruction]),
            references=(text_cell(row, "answer"),),
            kind=self.kind(row),
            document=optional_text(row.get("data_id")),
        )

    def score(
        self, answer: str, references: Sequence[str], details: Mapping[str, Any] | None = None
    ) -> float:
        """Whether the first character is the right letter."""
        return first_letter_match(answer, references[0])
