"""Which questions are asked together: samples with their images, sorted by length into batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from proxyv.data.images import ImageRef
from proxyv.eval.benchmarks import Benchmark, Record, Sample
from proxyv.eval.controls import blank_like, derange
from proxyv.eval.images import row_images
from proxyv.eval.metrics import final_answer
from proxyv.eval.sources import Rows

__all__ = [
    "Answering",
    "Item",
    "hash_file",
    "hash_shown",
    "item_images",
    "make_batches",
    "make_items",
    "make_record",
]


class Answering(Protocol):
    """What the runner needs of a model; `proxyv.eval.answerer.Answerer` is the real one."""

    def length(self, question: str, sizes_hw: Sequence[tuple[int, int]]) -> int:
        """Number of input tokens of a question about images of these sizes."""

    def shared_length(self, sizes_hw: Sequence[tuple[int, int]]) -> int:
        """How many of them are read once for all questions about the same images."""

    def prepare(self, questions: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Any:
        """What `generate` reads of a batch of questions, each about its own images.

        Questions about the same images come with the very same picture objects. Other threads
        call it while the model answers.
        """

    def generate(self, prepared: Any, max_new_tokens: int) -> list[str]:
        """Answer a prepared batch."""


@dataclass(frozen=True)
class Item:
    """A sample together with the image it is asked about.

    Attributes:
        index: row of the question.
        sample: the question.
        image_index: row whose images are shown, None for no image.
        sizes_hw: heights and widths of those images, usually of one.
        blank: whether grey images of these sizes are shown instead.
        length: input tokens, for sorting.
        image_hash: names those images, see `make_record`; None for no image.
        shared: how many of the tokens, those of the images, are read once for all questions about
            them.
    """

    index: int
    sample: Sample
    image_index: int | None
    sizes_hw: tuple[tuple[int, int], ...]
    blank: bool
    length: int
    image_hash: str | None = None
    shared: int = 0

    @property
    def own(self) -> int:
        """Input tokens that are not of shared images."""
        return self.length - self.shared

    def is_of(self, record: Record) -> bool:
        """Whether a record is of this question about these images.

        What is compared are the prompt, the references, and hashes of the encoded images. These
        change with any byte of a file, so also where the same picture was encoded anew; a record
        from before there were such hashes is taken as it is.
        """
        return (
            record["prompt"] == self.sample.prompt
            and record["references"] == list(self.sample.references)
            and record["image_index"] == self.image_index
            and record.get("image_hash", self.image_hash) == self.image_hash
        )


def make_record(
    benchmark: Benchmark,
    rows: Rows,
    index: int,
    *,
    sample: Sample | None,
    image_index: int | None = None,
    image_hash: str | None = None,
    answer: str | None = None,
    error: Exception | None = None,
) -> Record:
    """The result of one sample; with an error, or without an answer, it counts as wrong.

    Returns:
        ``index`` (row), ``question_id``, ``question``, ``prompt``, ``references``, ``answer`` (as
        the model gave it), ``score``, ``kind``, ``document``, ``image_index`` (row whose image was
        shown), ``image_hash`` (of the encoded files shown, or of the sizes of blank images),
        ``details`` (what else the score depends on) and ``error``.
    """
    row = rows.text(index)
    references = [] if sample is None else list(sample.references)
    details = {} if sample is None else dict(sample.details)
    score = 0.0 if benchmark.scored else None
    if benchmark.scored and answer is not None and not error:
        score = benchmark.score(final_answer(answer), references, details)
    return {
        "index": index,
        "question_id": benchmark.question_id(index, row),
        "question": None if sample is None else sample.question,
        "prompt": None if sample is None else sample.prompt,
        "references": references,
        "answer": answer,
        "score": score,
        "kind": benchmark.kind(row),
        "document": None if sample is None else sample.document,
        "image_index": image_index,
        "image_hash": image_hash,
        "details": details,
        "error": None if error is None else " ".join(str(error).split()),
    }


def hash_file(image: ImageRef) -> str:
    """Names an image by its encoded file."""
    return hashlib.sha256(image.content()).hexdigest()


def hash_shown(seen: Iterable[str]) -> str:
    """The ``image_hash`` of a record whose images have these hashes (blank ones: sizes)."""
    return hashlib.sha256(" ".join(seen).encode()).hexdigest()[:16]


def make_items(
    benchmark: Benchmark,
    rows: Rows,
    indices: Iterable[int],
    answering: Answering,
    control: str | None = None,
    seed: int = 0,
) -> tuple[list[Item], list[Record]]:
    """Read the questions and look at their images, without decoding these.

    Returns:
        The items in row order, and one record for each row that cannot be asked.
    """
    samples: dict[int, Sample] = {}
    sizes: dict[int, tuple[tuple[int, int], ...]] = {}
    hashes: dict[int, list[str]] = {}
    owners: dict[int, list[str]] = {}
    failures: list[Record] = []
    for index in indices:
        sample = None
        try:
            sample = benchmark.sample(index, rows.text(index))
            if control != "question-only" or benchmark.needs_image_size:
                images = row_images(benchmark, rows, index)
                sizes[index] = tuple(image.size_hw() for image in images)
                hashes[index] = [hash_file(image) for image in images]
            if benchmark.needs_image_size:
                sample = benchmark.with_image_size(sample, sizes[index][0])
            if control == "shuffled-images":
                owners[index] = [f"image {digest}" for digest in hashes[index]]
                if sample.document is not None:
                    owners[index].append("document " + sample.document)
        except ValueError as error:
            failures.append(make_record(benchmark, rows, index, sample=sample, error=error))
            continue
        samples[index] = sample
    shown: dict[int, int | None] = {index: index for index in samples}
    if control == "question-only":
        shown = dict.fromkeys(samples)
    elif control == "shuffled-images":
        usable = list(samples)
        partners = derange([owners[index] for index in usable], seed)
        shown = {index: usable[partner] for index, partner in zip(usable, partners, strict=True)}
    items = []
    for index, sample in samples.items():
        image_index = shown[index]
        sizes_hw = () if image_index is None else sizes[image_index]
        try:
            length = answering.length(sample.prompt, sizes_hw)
        except ValueError as error:
            failures.append(make_record(benchmark, rows, index, sample=sample, error=error))
            continue
        blank = control == "blank-images"
        shown_hash = None
        if image_index is not None:
            seen = map(str, sizes_hw) if blank else hashes[image_index]
            shown_hash = hash_shown(seen)
        shared = answering.shared_length(sizes_hw)
        items.append(Item(index, sample, image_index, sizes_hw, blank, length, shown_hash, shared))
    return items, failures


def make_batches(
    items: Sequence[Item], batch_size: int, most_tokens: int | None = None
) -> list[list[Item]]:
    """Cut the items into batches of similar length, the longest first.

    Items that share what they read of their images stand together, where the longest of them
    belongs. The order depends on nothing but the items, so that a resumed run has the same batches.
    What does not fit in memory fails in one of the first batches, not in the last.

    Args:
        items: the questions.
        batch_size: most questions in a batch.
        most_tokens: most input tokens that are read in a batch, padding included; a longer
            question is alone.
    """
    groups: dict[str | int, list[Item]] = {}
    for item in sorted(items, key=lambda item: (-item.length, item.index)):
        alone = item.shared == 0 or item.image_hash is None
        groups.setdefault(item.index if alone else str(item.image_hash), []).append(item)
    batches: list[list[Item]] = []
    for item in (item for group in groups.values() for item in group):
        last = [*batches[-1], item] if batches else []
        if not last or len(last) > batch_size or (
            most_tokens is not None and _tokens_read(last) > most_tokens
        ):  # fmt: skip
            batches.append([item])
        else:
            batches[-1].append(item)
    return batches


def _tokens_read(batch: Sequence[Item]) -> int:
    """Input tokens that are read for a batch, padding included; of shared ones, once a set."""
    shown = {item.image_hash for item in batch}
    if len(shown) == len(batch) or not all(item.shared for item in batch):
        return len(batch) * max(item.length for item in batch)
    shared, own = max(item.shared for item in batch), max(item.own for item in batch)
    return len(shown) * shared + len(batch) * own


def item_images(benchmark: Benchmark, rows: Rows, item: Item) -> list[Image.Image]:
    """The images that are shown with a question, usually one.

    Raises:
        ValueError: the image cannot be decoded.
    """
    if item.image_index is None:
        return []
    if item.blank:
        return [blank_like(size_hw) for size_hw in item.sizes_hw]
    return [image.load() for image in row_images(benchmark, rows, item.image_index)]
