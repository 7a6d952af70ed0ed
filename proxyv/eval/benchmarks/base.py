"""What a benchmark is: where its rows come from, how it asks, and how it scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = ["Benchmark", "Record", "Sample"]

Record = dict[str, Any]
"""One line of the result file; `proxyv.eval.runner` documents its keys."""


@dataclass(frozen=True)
class Sample:
    """One question, ready to be asked and scored.

    Attributes:
        question_id: the data set's own id, or the row number where it has none.
        question: the question as the data set has it.
        prompt: what the model is asked, instruction included, without an image placeholder.
        references: accepted answers, at least one.
        kind: the part of the data set the question belongs to, None where there are no parts.
        document: id of the document that the image shows, None where the data set gives none.
    """

    question_id: str
    question: str
    prompt: str
    references: tuple[str, ...]
    kind: str | None = None
    document: str | None = None


class Benchmark(ABC):
    """One benchmark; each has a small file of its own.

    Class attributes:
        name: what ``--tasks`` calls it.
        repositories: hub ids, the current one first, then former ones.
        config: configuration name on the hub, None where there is only one.
        split: the split that is scored.
        columns: columns that a row must have.
        max_new_tokens: longest answer, in tokens; generation is greedy.
        main_score: the score that stands for the benchmark in a table.
    """

    name: ClassVar[str]
    repositories: ClassVar[tuple[str, ...]]
    config: ClassVar[str | None] = None
    split: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    max_new_tokens: ClassVar[int]
    main_score: ClassVar[str]

    def question_id(self, index: int, row: Mapping[str, Any]) -> str:
        """Name a row, also one that is otherwise unusable."""
        return str(index)

    def kind(self, row: Mapping[str, Any]) -> str | None:
        """The part of the data set a row belongs to, also of one that is otherwise unusable."""
        return None

    @abstractmethod
    def sample(self, index: int, row: Mapping[str, Any]) -> Sample:
        """Make the question of a row.

        Raises:
            ValueError: the row has no question or no answer.
        """

    @abstractmethod
    def score(self, answer: str, references: Sequence[str]) -> float:
        """Score one answer, between 0 and 1."""

    @abstractmethod
    def scores(self, records: Sequence[Record]) -> dict[str, list[float]]:
        """Group the scores of all samples by the name of the mean they go into."""


def text_cell(row: Mapping[str, Any], column: str) -> str:
    """The text in a column; anything but a non-empty text is an error that names the column."""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column {column!r} holds {value!r}, a non-empty text is needed")
    return value
