"""Run benchmarks on a model: batches in, one JSONL line per sample out, `results.json` at the end.

An output folder holds `settings.json` (what the answers depend on), `<task>.jsonl` and
`results.json`. A run that was killed goes on where it stopped when it is started again with the
same settings: the batches are the same, so the answers and scores are the same.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)

from proxyv.cli import CommandError
from proxyv.eval.benchmarks import Benchmark, Record
from proxyv.eval.plan import Answering, Item, item_images, make_batches, make_items, make_record
from proxyv.eval.records import append_records, read_records, rewrite_records, write_json
from proxyv.eval.sources import Rows
from proxyv.eval.statistics import bootstrap_interval

__all__ = [
    "RunOptions",
    "chosen_rows",
    "evaluate",
    "open_output",
    "summarise",
    "write_submission",
]

SHOWN_KINDS = 5


@dataclass(frozen=True)
class RunOptions:
    """How a run asks, whatever the model.

    Attributes:
        batch_size: questions that are answered together.
        limit: number of rows from the start of each task, None for all.
        control: name of a control, None for the real images.
        seed: seed of the shuffled images.
    """

    batch_size: int = 16
    limit: int | None = None
    control: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                option = name.replace("_", "-")
                raise CommandError(f"--{option} {value}: a whole number from 1 on is needed")


def open_output(folder: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Prepare an output folder, or take up the run that it holds.

    Raises:
        CommandError: the folder holds a run with other settings; the first difference is named.
    """
    path = folder / "settings.json"
    if overwrite:
        answers = [*folder.glob("*.jsonl"), *folder.glob("*_for_submission.json")]
        for old in [path, folder / "results.json", *answers]:
            old.unlink(missing_ok=True)
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise CommandError(
                f"{path} is damaged ({error}); start again with --overwrite"
            ) from error
        for name, value in settings.items():
            if before.get(name) != value:
                raise CommandError(
                    f"{folder} holds a run with {name} {before.get(name)!r}, this one has "
                    f"{value!r}: give another --output, or start again with --overwrite"
                )
        return
    write_json(path, dict(settings))


def evaluate(
    benchmark: Benchmark,
    rows: Rows,
    answering: Answering,
    options: RunOptions,
    output: Path,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Ask every question of a benchmark that the output file does not hold yet, and score all.

    Returns:
        The task's entry of ``results.json`` (see `summarise`).
    """
    started = time.monotonic()
    indices = chosen_rows(benchmark, rows, options.limit)
    _warn_of_limit(benchmark, rows, indices, warn)
    reading = track(
        indices, f"{benchmark.name}: reading", console=Console(stderr=True), transient=True
    )
    items, failures = make_items(benchmark, rows, reading, answering, options.control, options.seed)
    path = output / f"{benchmark.name}.jsonl"
    done = _usable_records(path, {item.index: item for item in items})
    if done:
        warn(f"{benchmark.name}: resuming, {len(done)} of {len(indices)} samples are in {path}")
    records = {record["index"]: record for record in [*done, *failures]}
    rewrite_records(path, records.values())
    with _progress() as progress:
        bar = progress.add_task(benchmark.name, total=len(indices), completed=len(records))
        for batch in make_batches(items, options.batch_size):
            missing = {item.index for item in batch} - records.keys()
            if missing:
                answered = _answer_batch(benchmark, rows, batch, answering)
                new = [record for record in answered if record["index"] in missing]
                append_records(path, new)
                records |= {record["index"]: record for record in new}
                progress.update(bar, advance=len(new))
    ordered = [records[index] for index in sorted(records)]
    write_submission(benchmark, ordered, output, warn)
    summary = summarise(benchmark, ordered)
    return {"data": rows.origin, **summary, "seconds": round(time.monotonic() - started, 1)}


def chosen_rows(benchmark: Benchmark, rows: Rows, limit: int | None) -> Sequence[int]:
    """The rows that are asked: the first ones, without groups that the limit would cut.

    Raises:
        CommandError: a group of rows that are scored together is incomplete in the data, or no
            complete one is left.
    """
    indices: Sequence[int] = range(len(rows) if limit is None else min(limit, len(rows)))
    size = benchmark.group_size
    if size == 1:
        return indices
    groups = [benchmark.group(rows.text(index)) for index in range(len(rows))]
    for group, count in Counter(groups).items():
        if count != size:
            raise CommandError(
                f"{benchmark.name}: {rows.origin} holds {count} rows of {group}, {size} are needed"
            )
    counts = Counter(groups[index] for index in indices)
    whole = [index for index in indices if counts[groups[index]] == size]
    if not whole:
        raise CommandError(
            f"--limit {limit}: {benchmark.name} is scored in groups of {size} rows and the first "
            "rows hold no whole group, take more"
        )
    return whole


def write_submission(
    benchmark: Benchmark,
    records: Sequence[Record],
    output: Path,
    warn: Callable[[str], None],
) -> None:
    """Write the file that a test server takes, where only it knows the answers."""
    if benchmark.scored:
        return
    path = output / f"{benchmark.name}_for_submission.json"
    write_json(path, benchmark.submission(records))
    warn(f"{benchmark.name}: only the test server can score it; upload {path}")


def _warn_of_limit(
    benchmark: Benchmark, rows: Rows, indices: Sequence[int], warn: Callable[[str], None]
) -> None:
    if len(indices) == len(rows):
        return
    chosen = {benchmark.kind(rows.text(index)) for index in indices}
    every = {benchmark.kind(rows.text(index)) for index in range(len(rows))}
    if every != chosen:
        lost = sorted(map(str, every - chosen))
        shown = ", ".join(lost[:SHOWN_KINDS])
        more = len(lost) - SHOWN_KINDS
        warn(
            f"{benchmark.name}: --limit takes the first {len(indices)} rows and leaves out every "
            f"row of {shown}{f' and {more} more kinds' if more > 0 else ''}: the score is not that "
            "of the whole benchmark"
        )
    if benchmark.limit_note is not None:
        warn(f"{benchmark.name}: with --limit {benchmark.limit_note}")


def _usable_records(path: Path, items: Mapping[int, Item]) -> list[Record]:
    """Records of an earlier run that are answers to the same questions."""
    usable = []
    for record in read_records(path):
        item = items.get(record["index"])
        if item is None or record["error"] is not None:
            continue  # tried again
        same = (
            record["prompt"] == item.sample.prompt
            and record["references"] == list(item.sample.references)
            and record["image_index"] == item.image_index
        )
        if not same:
            raise CommandError(
                f"{path}: row {record['index']} is another question now, the data has changed; "
                "give another --output, or start again with --overwrite"
            )
        usable.append(record)
    return usable


def _answer_batch(
    benchmark: Benchmark, rows: Rows, batch: Sequence[Item], answering: Answering
) -> list[Record]:
    """Answer one batch; a sample whose image cannot be decoded fails alone."""

    def record(item: Item, **outcome: Any) -> Record:
        return make_record(
            benchmark,
            rows,
            item.index,
            sample=item.sample,
            image_index=item.image_index,
            **outcome,
        )

    ready, images, records = [], [], []
    for item in batch:
        try:
            images.append(item_images(benchmark, rows, item))
            ready.append(item)
        except ValueError as error:
            records.append(record(item, error=error))
    if ready:
        questions = [item.sample.prompt for item in ready]
        answers = answering.answer(questions, images, benchmark.max_new_tokens)
        for item, answer in zip(ready, answers, strict=True):
            records.append(record(item, answer=answer))
    return records


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def summarise(benchmark: Benchmark, records: Sequence[Record]) -> dict[str, Any]:
    """Scores of a task from its records alone.

    Returns:
        ``samples``, ``failed``, ``errors`` (one line for each failed sample), ``main_score``, and
        ``scores``: for each name ``value``, ``interval`` (95 % bootstrap) and ``samples`` (or
        groups of samples, where these are scored together).
    """
    failed = [record for record in records if record["error"] is not None]
    return {
        "samples": len(records),
        "failed": len(failed),
        "errors": [f"{record['question_id']}: {record['error']}" for record in failed],
        "main_score": benchmark.main_score,
        "scores": {
            name: {
                "value": score.value,
                "interval": list(bootstrap_interval(score.parts)),
                "samples": len(score.parts),
            }
            for name, score in benchmark.scores(records).items()
        },
    }
