"""DocVQA: "What is the 'actual' value per 1000, during the year 1975?" -> "0.28".

Questions about scanned pages (letters, forms, tables, reports), answered by text on the page.
Scored by ANLS against one or more accepted spellings; 5,349 validation questions.

Source: lmms-eval 0.7.3, task docvqa_val. Differs: no.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxyv.eval.benchmarks.base import Benchmark, Record, Sample, text_cell
from proxyv.eval.metrics import anls

__all__ = ["DocVQA"]


class DocVQA(Benchmark):
    """Questions about scanned documents, scored by ANLS."""

    name = "docvqa"
    repositories = ("lmms-lab-encoder/DocVQA", "lmms-lab/DocVQA")
    config = "DocVQA"
    split = "validation"
    columns = ("questionId", "question", "image", "answers")
    max_new_tokens = 32
    main_score = "anls"

    def question_id(self, index: int, row: Mapping[str, Any]) -> str:
        """The data set's own id."""
        return str(row["questionId"])

    def sample(self, index: int, row: Mapping[str, Any]) -> Sample:
        """Make the question of a row (see the base class)."""
        question = text_cell(row, "question")
        answers = row.get("answers")
        if not isinstance(answers, Sequence) or isinstance(answers, str) or not answers:
            raise ValueError(
                f"column 'answers' holds {answers!r}, a list with at least one answer is needed"
            )
        return Sample(
            question_id=self.question_id(index, row),
            question=question,
            prompt=f"{question}\nAnswer the question using a single word or phrase.",
            references=tuple(str(answer) for answer in answers),
            document=None if row.get("docId") is None else str(row["docId"]),
        )

    def score(self, answer: str, references: Sequence[str]) -> float:
        """ANLS of one answer."""
        return anls(answer, references)

    def scores(self, records: Sequence[Record]) -> dict[str, list[float]]:
        """One mean, over all questions."""
        return {"anls": [record["score"] for record in records]}
