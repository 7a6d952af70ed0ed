"""OCRBench: "what is written in the image?" -> "CENTRE".

Reading of words, scenes, documents, forms and formulas: 1,000 questions in ten categories. An
answer is right if it contains the reference anywhere. The score is the number of right answers
out of 1,000.

Source: lmms-eval 0.7.3, task ocrbench. Differs: no.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxyv.eval.benchmarks.base import (
    Benchmark,
    Record,
    Sample,
    Score,
    answer_list,
    mean_score,
    text_cell,
)
from proxyv.eval.metrics import OCRBENCH_SIZE, ocrbench_match, ocrbench_score

__all__ = ["CATEGORIES", "OCRBench"]

CATEGORIES = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition",
)


class OCRBench(Benchmark):
    """Reading of text in ten categories."""

    name = "ocrbench"
    repositories = ("echo840/OCRBench",)
    split = "test"
    columns = ("dataset", "question", "question_type", "answer", "image")
    kind_column = "question_type"
    max_new_tokens = 128
    main_score = "ocrbench_accuracy"
    limit_note = "the score is the number of right answers out of 1,000, however many are asked"

    def sample(self, index: int, row: Mapping[str, Any]) -> Sample:
        """Make the question of a row (see the base class)."""
        question = text_cell(row, "question").strip()
        category = self.kind(row)
        if category not in CATEGORIES:
            raise ValueError(
                f"column 'question_type' holds {category!r}, one of {', '.join(CATEGORIES)} is "
                "needed"
            )
        answer = row.get("answer")
        return Sample(
            question_id=self.question_id(index, row),
            question=question,
            prompt=question,
            references=(answer,) if isinstance(answer, str) else answer_list(row, "answer"),
            kind=category,
            details={"dataset": text_cell(row, "dataset")},
        )

    def score(
        self, answer: str, references: Sequence[str], details: Mapping[str, Any] | None = None
    ) -> float:
        """Whether the answer contains a reference."""
        return ocrbench_match(answer, references, (details or {})["dataset"])

    def scores(self, records: Sequence[Record]) -> dict[str, Score]:
        """Right answers out of 1,000, and the share of right ones in each category."""
        scores = [record["score"] for record in records]
        parts = [score * len(scores) / OCRBENCH_SIZE for score in scores]
        found = {"ocrbench_accuracy": Score(ocrbench_score(scores), parts)}
        for category in CATEGORIES:
            own = [record["score"] for record in records if record["kind"] == category]
            if own:
                found[category] = mean_score(own)
        return found
