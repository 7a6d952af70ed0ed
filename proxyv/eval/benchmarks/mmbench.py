"""MMBench-EN: "Identify the question that Madelyn and Tucker's experiment can best answer." -> "B".

Multiple-choice questions on twenty abilities, asked again with their options rotated: a question
counts only if all its rotations are answered rightly ("circular"). What an answer means is found
by fixed rules, without another model ("static"). About 4,300 rows.

Source: lmms-eval 0.7.3, task mmbench_en_dev_static, metric gpt_eval_score (0 to 100). Differs:
that number is called circular_accuracy, the accuracy without rotations is given as well, and the
harness's spreadsheet to submit is not written.
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
    number_text,
    text_cell,
)
from proxyv.eval.choices import LETTERS, ROTATION, chosen_option, circular_hits

__all__ = ["MMBench"]

SCORED_LETTERS = "ABCD"
INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."


class MMBench(Benchmark):
    """Multiple-choice questions, each asked with all rotations of its options."""

    name = "mmbench"
    repositories = ("lmms-lab-encoder/MMBench", "lmms-lab/MMBench")
    config = "en"
    split = "dev"
    columns = ("index", "question", "hint", "answer", "A", "B", "C", "D", "category", "image")
    kind_column = "category"
    max_new_tokens = 1024
    main_score = "circular_accuracy"
    is_share = False
    limit_note = "rotations are left out, and the score turns into accuracy without rotations"

    def question_id(self, index: int, row: Mapping[str, Any]) -> str:
        """The data set's number; rotations add millions to it, so a row number cannot stand in."""
        return number_text(row.get("index"))

    def sample(self, index: int, row: Mapping[str, Any]) -> Sample:
        """Make the question of a row (see the base class)."""
        number = self.question_id(index, row)
        if not number.isdecimal():
            raise ValueError(f"column 'index' holds {number!r}, a whole number is needed")
        question = text_cell(row, "question")
        hint = f"{row['hint']} " if _is_given(row.get("hint")) else ""
        options = [f"{x}. {row[x]}" for x in LETTERS if row.get(x) and _is_given(row[x])]
        block = "\n".join(["There are several options:", *options]).rstrip("\n")
        return Sample(
            question_id=number,
            question=question,
            prompt=f"{hint}{question} {block}\n{INSTRUCTION}",
            references=(text_cell(row, "answer"),),
            kind=self.kind(row),
            document=str(int(number) % ROTATION),
            details={"options": {x: str(row[x]) for x in SCORED_LETTERS if _is_there(row.get(x))}},
        )

    def score(
        self, answer: str, references: Sequence[str], details: Mapping[str, Any] | None = None
    ) -> float:
        """Whether the answer means the right letter."""
        return float(chosen_option(answer, (details or {})["options"]) == references[0])

    def scores(self, records: Sequence[Record]) -> dict[str, Score]:
        """Questions right in all rotations, and right as they are, in percent."""
        numbered = [record for record in records if record["question_id"].isdecimal()]
        indices = [int(record["question_id"]) for record in numbered]
        right = [record["score"] == 1 for record in numbered]
        hits = circular_hits(right, indices)
        plain = [good for good, index in zip(right, indices, strict=True) if index < ROTATION]
        if not plain:
            raise ValueError(f"MMBench: no row has an 'index' below {ROTATION:,}, no base question")
        unnumbered = [0.0] * (len(records) - len(numbered))
        return {
            "circular_accuracy": mean_score([100.0 * hit for hit in hits.values()] + unnumbered),
            "vanilla_accuracy": mean_score([100.0 * good for good in plain] + unnumbered),
        }


def _is_there(cell: Any) -> bool:
    """Whether a cell has any content; not-a-number is how tables store nothing."""
    return cell is not None and cell == cell


def _is_given(cell: Any) -> bool:
    """Whether a cell has content that is meant: a missing hint or option is the text ``nan``."""
    return _is_there(cell) and cell != "nan"
