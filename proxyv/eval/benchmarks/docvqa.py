"""DocVQA: "What is the 'actual' value per 1000, during the year 1975?" -> "0.28".

Questions about scanned pages (letters, forms, tables, reports), answered by text on the page.
Scored by ANLS against one or more accepted spellings; 5,349 validation questions. The answers of
the 5,188 test questions are known to the test server only: that task writes the file to submit.

Source: lmms-eval 0.7.3, tasks docvqa_val and docvqa_test. Differs: no.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from proxyv.eval.benchmarks.base import (
    Benchmark,
    Record,
    Sample,
    Score,
    answer_list,
    number_text,
    optional_text,
    text_cell,
)
from proxyv.eval.metrics import anls, final_answer

__all__ = ["DocVQA", "DocVQATest"]


class DocVQA(Benchmark):
    """Questions about scanned documents, scored by ANLS."""

    name = "docvqa"
    repositories = ("lmms-lab-encoder/DocVQA", "lmms-lab/DocVQA")
    config = "DocVQA"
    split = "validation"
    columns: ClassVar[tuple[str, ...]] = ("questionId", "question", "image", "answers")
    max_new_tokens = 32
    id_column = "questionId"
    main_score = "anls"
    document_column = "docId"

    def sample(self, index: int, row: Mapping[str, Any]) -> Sample:
        """Make the question of a row (see the base class)."""
        question = text_cell(row, "question")
        return Sample(
            question_id=self.question_id(index, row),
            question=question,
            prompt=f"{question}\nAnswer the question using a single word or phrase.",
            references=answer_list(row) if self.scored else (),
            document=optional_text(row.get(self.document_column)),
        )

    def score(
        self, answer: str, references: Sequence[str], details: Mapping[str, Any] | None = None
    ) -> float:
        """ANLS of one answer."""
        return anls(answer, references)


class DocVQATest(DocVQA):
    """The test questions, whose answers only the test server knows."""

    name = "docvqa_test"
    folder = "docvqa"
    split = "test"
    columns = ("questionId", "question", "image")
    needs_id = True
    scored = False

    def question_id(self, index: int, row: Mapping[str, Any]) -> str:
        """The data set's number, which the test server takes as a number."""
        own = row.get("questionId")
        return str(index) if own is None else number_text(own)

    def check_id(self, row: Mapping[str, Any]) -> None:
        """The server's file holds whole numbers (see the base class)."""
        super().check_id(row)
        number = number_text(row["questionId"])
        try:
            int(number)
        except ValueError as error:
            raise ValueError(
                f"has 'questionId' {number!r}, and the test server takes whole numbers"
            ) from error

    def scores(self, records: Sequence[Record]) -> dict[str, Score]:
        """Nothing can be scored here."""
        return {}

    def submission(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """One entry for each question, in the order of the rows; a failed one has no text."""
        return [
            {
                "questionId": int(record["question_id"]),
                "answer": final_answer(record["answer"] or ""),
            }
            for record in records
        ]
