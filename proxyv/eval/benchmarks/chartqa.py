"""ChartQA: "How many food item is shown in the bar graph?" -> "14".

Questions about charts, half written by people and half made from captions ("augmented").
Scored by relaxed accuracy: a number may be off by 5 %, other text must match without case;
2,500 test questions, 1,250 of each half, the human ones first.

Source: lmms-eval 0.7.3, task chartqa. Differs: no.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxyv.eval.benchmarks.base import (
    Benchmark,
    Record,
    Sample,
    Score,
    mean_score,
    text_cell,
)
from proxyv.eval.metrics import relaxed_accuracy

__all__ = ["ChartQA"]


class ChartQA(Benchmark):
    """Questions about charts, scored by relaxed accuracy."""

    name = "chartqa"
    repositories = ("lmms-lab-encoder/ChartQA", "lmms-lab/ChartQA")
    split = "test"
    columns = ("type", "question", "answer", "image")
    kind_column = "type"
    max_new_tokens = 16
    main_score = "relaxed_overall"

    def sample(self, index: int, row: Mapping[str, Any]) -> Sample:
        """Make the question of a row (see the base class)."""
        question = text_cell(row, "question")
        return Sample(
            question_id=self.question_id(index, row),
            question=question,
            prompt=f"{question}\nAnswer the question with a single word.",
            references=(text_cell(row, "answer"),),
            kind=self.kind(row),
        )

    def score(
        self, answer: str, references: Sequence[str], details: Mapping[str, Any] | None = None
    ) -> float:
        """Relaxed accuracy of one answer."""
        return relaxed_accuracy(answer, references[0])

    def scores(self, records: Sequence[Record]) -> dict[str, Score]:
        """Means over all questions and over each half; only ``human_test`` counts as human."""
        human = [record["score"] for record in records if record["kind"] == "human_test"]
        augmented = [record["score"] for record in records if record["kind"] != "human_test"]
        every = [record["score"] for record in records]
        groups = {
            "relaxed_overall": every,
            "relaxed_human_split": human,
            "relaxed_augmented_split": augmented,
        }
        return {name: mean_score(scores) for name, scores in groups.items() if scores}
