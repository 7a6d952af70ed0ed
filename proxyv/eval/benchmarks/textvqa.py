"""TextVQA: "what is the brand of this camera?" -> "dakota".

Questions about photographs that can only be answered by reading text in them; ten people answered
each. Scored by VQA soft accuracy; 5,000 validation questions. No recognised text is given in the
prompt, and only the first letter of the question is a capital.

Source: lmms-eval 0.7.3, task textvqa_val. Differs: the harness's file to submit is not written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxyv.eval.benchmarks.base import (
    Benchmark,
    Sample,
    answer_list,
    optional_text,
    text_cell,
)
from proxyv.eval.vqa_text import vqa_accuracy

__all__ = ["TextVQA"]


class TextVQA(Benchmark):
    """Questions about text in photographs, scored by agreement with ten people."""

    name = "textvqa"
    repositories = ("lmms-lab-encoder/textvqa", "lmms-lab/textvqa")
    split = "validation"
    columns = ("question_id", "question", "image", "answers")
    max_new_tokens = 1024
    id_column = "question_id"
    main_score = "exact_match"

    def sample(self, index: int, row: Mapping[str, Any]) -> Sample:
        """Make the question of a row (see the base class)."""
        question = text_cell(row, "question")
        return Sample(
            question_id=self.question_id(index, row),
            question=question,
            prompt=f"{question.capitalize()}\nAnswer the question using a single word or phrase.",
            references=answer_list(row),
            document=optional_text(row.get("image_id")),
        )

    def score(
        self, answer: str, references: Sequence[str], details: Mapping[str, Any] | None = None
    ) -> float:
        """VQA soft accuracy of one answer."""
        return vqa_accuracy(answer, references)
