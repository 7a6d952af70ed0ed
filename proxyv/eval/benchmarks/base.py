"""What a benchmark is: where its rows come from, how it asks, and how it scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from proxyv.eval.metrics import mean

__all__ = [
    "Benchmark",
    "ImageTable",
    "Record",
    "Sample",
    "Score",
    "answer_list",
    "mean_score",
    "number_text",
    "optional_text",
    "text_cell",
]

Record = dict[str, Any]
"""One line of the result file; `proxyv.eval.runner` documents its keys."""


@dataclass(frozen=True)
class Sample:
    """One question, ready to be asked and scored.

    Attributes:
        question_id: the data set's own id, or the row number where it has none.
        question: the question as the data set has it.
        prompt: what the model is asked, instruction included, without an image placeholder.
        references: accepted answers; none where a test server keeps them.
        kind: the part of the data set the question belongs to, None where there are no parts.
        document: id of the document that the image shows, None where the data set gives none.
        details: what else the score of an answer depends on; kept in the result file.
    """

    question_id: str
    question: str
    prompt: str
    references: tuple[str, ...]
    kind: str | None = None
    document: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


class Score(NamedTuple):
    """One score of a benchmark.

    Attributes:
        value: the score.
        parts: one number for each sample, or each group of samples that is scored as one; their
            mean is the score, and they tell how uncertain it is.
    """

    value: float
    parts: Sequence[float]


def mean_score(parts: Sequence[float]) -> Score:
    """The score that is the plain mean of its parts."""
    return Score(mean(parts), parts)


class ImageTable(NamedTuple):
    """A table that holds the images of another one.

    Attributes:
        config: its configuration name on the hub, and the name of its folder on disk.
        key: column of the questions that names an image.
        name: column of the images that holds that name.
    """

    config: str
    key: str
    name: str


class Benchmark(ABC):
    """One benchmark; each has a small file of its own.

    Class attributes:
        name: what ``--tasks`` calls it.
        folder: its folder below ``--data``, None for one of its name.
        repositories: hub ids, the current one first, then former ones.
        config: configuration name on the hub, None where there is only one.
        split: the split that is scored.
        columns: columns that a row must have; ``a|b`` stands for one of two.
        image_table: where the images are, None where each row has its own.
        id_column: holds the data set's own id; the row number is taken where it is empty or None.
        kind_column: names the part of the data set that a row belongs to; None where it has none.
        needs_id: whether nothing can be scored or handed in without that id.
        max_new_tokens: longest answer, in tokens; generation is greedy.
        main_score: the score that stands for the benchmark in a table.
        is_share: whether that score lies between 0 and 1, so that it can be averaged with those of
            others; MME's is a sum, MMBench's in percent.
        scored: whether the answers are known here, or only to a test server.
        needs_image_size: whether the references depend on it.
        group_size: number of rows that can only be scored together.
        limit_note: what ``--limit`` does to the score besides taking a part of the rows.
    """

    name: ClassVar[str]
    folder: ClassVar[str | None] = None
    repositories: ClassVar[tuple[str, ...]]
    config: ClassVar[str | None] = None
    split: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    image_table: ClassVar[ImageTable | None] = None
    id_column: ClassVar[str | None] = None
    kind_column: ClassVar[str | None] = None
    needs_id: ClassVar[bool] = False
    max_new_tokens: ClassVar[int]
    main_score: ClassVar[str]
    is_share: ClassVar[bool] = True
    scored: ClassVar[bool] = True
    needs_image_size: ClassVar[bool] = False
    group_size: ClassVar[int] = 1
    limit_note: ClassVar[str | None] = None

    def questions(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """The questions that a row (without its image) holds: one by default.

        Returns:
            For each question the columns in which it differs from the row; nothing for a row that
            does not belong to the benchmark.
        """
        return [{}]

    def question_id(self, index: int, row: Mapping[str, Any]) -> str:
        """Name a row, also one that is otherwise unusable."""
        own = None if self.id_column is None else row.get(self.id_column)
        return str(index) if own is None else str(own)

    def kind(self, row: Mapping[str, Any]) -> str | None:
        """The part of the data set a row belongs to, also of one that is otherwise unusable."""
        return None if self.kind_column is None else optional_text(row.get(self.kind_column))

    def group(self, row: Mapping[str, Any]) -> Hashable:
        """The group of `group_size` rows that a row belongs to."""
        return None

    def check_id(self, row: Mapping[str, Any]) -> None:
        """Look at the id of a row, where it is needed, before anything is asked.

        Raises:
            ValueError: it is not there, or of no use; the message continues "row 7 ...".
        """
        if self.id_column is not None and row.get(self.id_column) is None:
            raise ValueError(
                f"has no {self.id_column!r}, without which its answer belongs to no question"
            )

    def images(self, row: Mapping[str, Any]) -> list[Any]:
        """The encoded images of a row, in the order in which the model sees them."""
        return [row.get("image")]

    @abstractmethod
    def sample(self, index: int, row: Mapping[str, Any]) -> Sample:
        """Make the question of a row.

        Raises:
            ValueError: the row has no question or no answer.
        """

    def with_image_size(self, sample: Sample, size_hw: tuple[int, int]) -> Sample:
        """Complete a sample whose references depend on the height and width of its image."""
        return sample

    @abstractmethod
    def score(
        self, answer: str, references: Sequence[str], details: Mapping[str, Any] | None = None
    ) -> float:
        """Score one answer, between 0 and 1, from what its record holds.

        Args:
            answer: the model's text, its reasoning taken out by `final_answer`.
            references: accepted answers.
            details: those of the sample.
        """

    def scores(self, records: Sequence[Record]) -> dict[str, Score]:
        """The scores of the benchmark by name, from the records of all samples.

        By default there is one, the mean over all questions.
        """
        return {self.main_score: mean_score([record["score"] for record in records])}

    def submission(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """What a test server is sent, where `scored` is False."""
        raise NotImplementedError(f"{self.name} has no test server")


def answer_list(row: Mapping[str, Any], column: str = "answers") -> tuple[str, ...]:
    """The accepted answers in a column; an empty or missing list is an error that names it."""
    answers = row.get(column)
    if not isinstance(answers, Sequence) or isinstance(answers, str) or not answers:
        raise ValueError(
            f"column {column!r} holds {answers!r}, a list with at least one answer is needed"
        )
    return tuple(str(answer) for answer in answers)


def number_text(value: Any) -> str:
    """A cell that should hold a whole number, as text; tables with gaps store 7 as 7.0."""
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if whole else value)


def optional_text(value: Any) -> str | None:
    """A cell as text, None where it is empty."""
    return None if value is None else str(value)


def text_cell(row: Mapping[str, Any], column: str) -> str:
    """The text in a column; anything but a non-empty text is an error that names the column."""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column {column!r} holds {value!r}, a non-empty text is needed")
    return value
