"""MME perception: "Does this artwork exist in the form of painting?" -> "Yes".

Two yes-or-no questions on each image, one right and one wrong, in ten categories from existence
to reading. An image earns its accuracy in percent, and 100 more if both answers are right; the
score is the sum over the categories of their mean, 2,000 at most. Always "yes" earns 500.

Source: lmms-eval 0.7.3, task mme, metric mme_perception_score. Differs: the questions on
cognition, which do not enter that score, are not asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from proxyv.eval.benchmarks.base import (
    Benchmark,
    Record,
    Sample,
    Score,
    mean_score,
    optional_text,
    text_cell,
)
from proxyv.eval.metrics import mme_perception, yes_or_no

__all__ = ["MME"]

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
SUFFIX = " Please answer yes or no."


class MME(Benchmark):
    """Yes-or-no questions in pairs."""

    name = "mme"
    repositories = ("lmms-lab-encoder/MME", "lmms-lab/MME")
    split = "test"
    columns = ("question_id", "image", "question", "answer", "category")
    kind_column = "category"
    max_new_tokens = 16
    id_column = "question_id"
    needs_id = True
    main_score = "mme_perception_score"
    is_share = False
    group_size = 2
    limit_note = "the score is a sum over the categories that are there"

    def questions(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Only the categories of perception."""
        return [{}] if row.get("category") in PERCEPTION else []

    def group(self, row: Mapping[str, Any]) -> Hashable:
        """The two questions of an image in a category."""
        return (self.kind(row), optional_text(row.get("question_id")))

    def sample(self, index: int, row: Mapping[str, Any]) -> Sample:
        """Make the question of a row (see the base class)."""
        question = text_cell(row, "question").strip()
        return Sample(
            question_id=self.question_id(index, row),
            question=question,
            prompt=f"{question.replace(SUFFIX, '')}\n"
            "Answer the question using a single word or phrase.",
            references=(text_cell(row, "answer"),),
            kind=self.kind(row),
            document=self.question_id(index, row),
        )

    def score(
        self, answer: str, references: Sequence[str], details: Mapping[str, Any] | None = None
    ) -> float:
        """Whether the answer says the same of yes and no."""
        return float(yes_or_no(answer) == yes_or_no(references[0]))

    def scores(self, records: Sequence[Record]) -> dict[str, Score]:
        """The sum over the categories, and each category (200 at most)."""
        images: dict[tuple[str, str], list[float]] = {}
        for record in records:
            images.setdefault((record["kind"], record["question_id"]), []).append(record["score"])
        counts = Counter(category for category, _ in images)
        earned = {
            place: mme_perception(
                ["yes" if right else "no" for right in pair],
                ["yes"] * len(pair),
                [place[1]] * len(pair),
                [place[0]] * len(pair),
            )
            for place, pair in images.items()
        }
        parts = [value * len(images) / counts[place[0]] for place, value in earned.items()]
        found = {"mme_perception_score": mean_score(parts)}
        for category in PERCEPTION:
            own = [value for place, value in earned.items() if place[0] == category]
            if own:
                found[category] = mean_score(own)
        return found
