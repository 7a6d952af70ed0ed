"""Ask a model batch by batch: images are read ahead, and what does not fit in memory is cut.

While the model answers one batch, other threads read, decode and cut up the images of the next
ones. Where a piece of a batch runs out of memory, the whole batch is asked again in pieces of half
that size; later batches are cut likewise. The size found is kept in a file, one for each process.
How a batch is cut depends on that size alone, so a resumed run of one process cuts its batches as
the first one did.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from PIL import Image

from proxyv.cli import CommandError
from proxyv.eval.benchmarks import Benchmark, Record
from proxyv.eval.plan import Answering, Item, item_images, make_record
from proxyv.eval.sources import Rows
from proxyv.files import read_json, write_json

__all__ = ["Asker", "read_ahead"]

WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2))

Job = TypeVar("Job")
Result = TypeVar("Result")


class Piece(NamedTuple):
    """Questions that are asked together, and what the model reads of them."""

    items: list[Item]
    prepared: Any


class Cut(NamedTuple):
    """A batch that is ready to be asked, and the items of it that cannot be.

    Attributes:
        most: questions in a piece; None where it was not cut.
        pieces: of the batch.
        failures: items of which no input can be made.
    """

    most: int | None
    pieces: list[Piece]
    failures: list[tuple[Item, ValueError]]


class Loaded(NamedTuple):
    """A batch whose images have been read, and the items of it whose images cannot be."""

    items: list[Item]
    images: list[list[Image.Image]]
    failures: list[tuple[Item, ValueError]]
    cut: Cut


def read_ahead(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int = WORKERS
) -> Generator[Result, None, None]:
    """Results in the order of the jobs, at most ``workers`` computed ahead by other threads."""
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        waiting: collections.deque[Future[Result]] = collections.deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(function, job))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Asker:
    """Turns batches of questions into records.

    Args:
        benchmark: what the questions are of.
        rows: its rows.
        answering: the model.
        size_file: where the number of questions that fit in memory together is kept.
        warn: takes one line where that number falls.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        rows: Rows,
        answering: Answering,
        size_file: Path,
        warn: Callable[[str], None],
    ) -> None:
        self.benchmark, self.rows, self.answering = benchmark, rows, answering
        self.size_file, self.warn = size_file, warn
        self.most: int | None = None
        if size_file.is_file():
            self.most = _fitting(size_file)

    def ask(self, batches: Iterable[Sequence[Item]]) -> Iterator[list[Record]]:
        """The records of each batch in turn."""
        with closing(read_ahead(self._load, batches)) as ready:
            for loaded in ready:
                records = [self._record(item, error=error) for item, error in loaded.failures]
                cut, answered = loaded.cut, None
                while answered is None:
                    if cut.most != self.most:  # found too large since, here or in an earlier batch
                        cut = self._cut(loaded.items, loaded.images)
                    answered = self._answer(cut)
                yield records + answered

    def _load(self, batch: Sequence[Item]) -> Loaded:
        """Read the images of a batch, equal ones once; an item whose image is bad fails alone."""
        items, images, failures = [], [], []
        known: dict[str, list[Image.Image]] = {}
        for item in batch:
            try:
                name = item.image_hash or f"row {item.index}"
                if name not in known:
                    known[name] = item_images(self.benchmark, self.rows, item)
                images.append(known[name])
                items.append(item)
            except ValueError as error:
                failures.append((item, error))
        return Loaded(items, images, failures, self._cut(items, images))

    def _cut(self, items: list[Item], images: list[list[Image.Image]]) -> Cut:
        """Cut questions into pieces that fit in memory, and make the model's inputs."""
        most = self.most  # which may fall meanwhile, where another thread does this
        cut = Cut(most, [], [])
        size = most or max(1, len(items))
        for start in range(0, len(items), size):
            self._prepare(items[start : start + size], images[start : start + size], cut)
        return cut

    def _prepare(self, items: list[Item], images: list[list[Image.Image]], cut: Cut) -> None:
        """Make the model's inputs of a piece; where that fails, of each question alone."""
        try:
            prepared = self.answering.prepare([item.sample.prompt for item in items], images)
            cut.pieces.append(Piece(items, prepared))
        except ValueError as error:
            if len(items) == 1:
                cut.failures.append((items[0], error))
                return
            for item, image in zip(items, images, strict=True):  # find out which one it is
                self._prepare([item], [image], cut)

    def _answer(self, cut: Cut) -> list[Record] | None:
        """The records of a batch; None where a piece does not fit in memory, and `most` fell."""
        records = [self._record(item, error=error) for item, error in cut.failures]
        for piece in cut.pieces:
            answered = self._answer_piece(piece)
            if answered is None:
                return None
            records += answered
        return records

    def _answer_piece(self, piece: Piece) -> list[Record] | None:
        try:
            answers = self.answering.generate(piece.prepared, self.benchmark.max_new_tokens)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        else:
            return [
                self._record(item, answer=answer)
                for item, answer in zip(piece.items, answers, strict=True)
            ]
        # From here on the failed attempt is no longer referred to, and its memory is free.
        clear_device_cache(garbage_collection=True)
        if len(piece.items) > 1:
            self._reduce(len(piece.items) // 2)
            return None
        item = piece.items[0]
        reason = f"{item.length} input tokens do not fit in memory, even alone"
        return [self._record(item, error=ValueError(reason))]

    def _reduce(self, most: int) -> None:
        self.most = most
        write_json(self.size_file, {"fitting": most})
        self.warn(f"{self.benchmark.name}: out of memory, going on with {most} questions at a time")

    def _record(self, item: Item, **outcome: Any) -> Record:
        return make_record(
            self.benchmark,
            self.rows,
            item.index,
            sample=item.sample,
            image_index=item.image_index,
            image_hash=item.image_hash,
            **outcome,
        )


def _fitting(size_file: Path) -> int:
    """How many questions fit in memory together, as an earlier run found out."""
    advice = "delete it, and the number is found out again"
    fitting = read_json(size_file, advice).get("fitting")
    if not isinstance(fitting, int) or fitting < 1:
        raise CommandError(
            f"{size_file} is damaged (fitting is {fitting!r}, not a whole number from 1 on); "
            f"{advice}"
        )
    return fitting
