"""Run benchmarks on a model: batches in, one JSONL line per sample out, `results.json` at the end.

An output folder holds `settings.json` (what the answers depend on), `<task>.jsonl` and
`results.json`; while several processes run, also `<task>.rank<n>.jsonl`. A run that was killed
goes on where it stopped when it is started again with the same settings: the batches are the same,
so the answers and scores are the same. (Where memory is short, several processes cut theirs as each
has found: then which process goes on with a batch makes a difference.)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from proxyv.eval.asking import Asker
from proxyv.eval.benchmarks import Benchmark, Record
from proxyv.eval.plan import Answering, Item, make_batches, make_items
from proxyv.eval.records import append_records, read_records, rewrite_records
from proxyv.eval.sources import Rows
from proxyv.eval.statistics import bootstrap_interval
from proxyv.eval.team import ALONE, Team
from proxyv.files import read_json, write_json

__all__ = [
    "RunOptions",
    "chosen_rows",
    "evaluate",
    "open_output",
    "summarise",
    "write_submission",
]

SHOWN_KINDS = 5
WRITTEN = ("*.jsonl", "*.memory.json", "*_for_submission.json")


@dataclass(frozen=True)
class RunOptions:
    """How a run asks, whatever the model.

    Attributes:
        batch_size: questions that are answered together.
        limit: number of rows from the start of each task, None for all.
        control: name of a control, None for the real images.
        seed: seed of the shuffled images.
        batch_tokens: input tokens that are read together at most, None for any number.
    """

    batch_size: int = 16
    limit: int | None = None
    control: str | None = None
    seed: int = 0
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                option = name.replace("_", "-")
                raise CommandError(f"--{option} {value}: a whole number from 1 on is needed")


def open_output(folder: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Prepare an output folder, or take up the run that it holds.

    A setting that one of both runs does not name, such as a reduction, is None in that run.

    Raises:
        CommandError: the folder holds a run with other settings; the first difference is named.
    """
    path = folder / "settings.json"
    if overwrite:
        answers = [path for name in WRITTEN for path in folder.glob(name)]
        for stale in [path, folder / "results.json", *answers]:
            stale.unlink(missing_ok=True)
    if path.is_file():
        before = read_json(path, "start again with --overwrite")
        for name in dict.fromkeys([*settings, *before]):
            old, new = before.get(name), settings.get(name)
            if old != new:
                raise CommandError(
                    f"{folder} holds a run with {name} {old!r}, this one has {new!r}: give another "
                    "--output, or start again with --overwrite"
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
    team: Team = ALONE,
) -> dict[str, Any]:
    """Ask every question of a benchmark that the output file does not hold yet, and score all.

    Several processes share the batches; each writes a file of its own, and the first one puts
    them together. The result does not depend on their number.

    Returns:
        The task's entry of ``results.json``: ``data`` (where its rows are from), ``rows`` (how many
        there are, asked or not), what `summarise` tells, and ``seconds``.
    """
    started = time.monotonic()
    indices = chosen_rows(benchmark, rows, options.limit)
    _warn_of_limit(benchmark, rows, indices, warn)
    quiet = Console(stderr=True, quiet=not team.is_first)
    reading = track(indices, f"{benchmark.name}: reading", console=quiet, transient=True)
    items, failures = make_items(benchmark, rows, reading, answering, options.control, options.seed)
    path = output / f"{benchmark.name}.jsonl"
    if team.is_first:
        done = _usable_records(path, {item.index: item for item in items})
        if done:
            warn(f"{benchmark.name}: resuming, {len(done)} of {len(indices)} samples are in {path}")
        _gather(path, [*done, *failures])
    team.wait()
    known = {record["index"] for record in read_records(path)}
    batches = [
        batch
        for batch in make_batches(items, options.batch_size, options.batch_tokens)
        if any(item.index not in known for item in batch)
    ][team.rank :: team.size]
    own = _part(path, team.rank) if team.size > 1 else path
    asker = Asker(benchmark, rows, answering, own.with_suffix(".memory.json"), warn)
    with _progress(quiet) as progress:
        bar = progress.add_task(benchmark.name, total=sum(map(len, batches)))
        for answered in asker.ask(batches):
            append_records(own, (record for record in answered if record["index"] not in known))
            progress.update(bar, advance=len(answered))
    team.wait()
    if team.is_first:
        _gather(path, [record for part in _parts(path) for record in read_records(part)])
    team.wait()
    ordered = read_records(path)
    if team.is_first:
        whole = len(indices) == len(rows)
        write_submission(benchmark, ordered, output, warn, whole=whole, control=options.control)
    summary = summarise(benchmark, ordered)
    seconds = round(time.monotonic() - started, 1)
    return {"data": rows.origin, "rows": len(rows), **summary, "seconds": seconds}


def _part(path: Path, rank: int) -> Path:
    """The file of one of several processes."""
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def _parts(path: Path) -> list[Path]:
    """The files that hold records of a task: its own, and those of several processes."""
    return [path, *sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))]


def _gather(path: Path, records: Iterable[Record]) -> None:
    """Put the records of all files into one, in the order of their rows."""
    unique = {record["index"]: record for record in records}
    rewrite_records(path, [unique[index] for index in sorted(unique)])
    for part in _parts(path)[1:]:
        part.unlink()


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
    *,
    whole: bool,
    control: str | None,
) -> None:
    """Write the file that a test server takes, where only it knows the answers.

    Args:
        benchmark: what the records are of.
        records: of all samples that were asked.
        output: the result folder.
        warn: is told to upload the file, or why that would be wrong.
        whole: whether every row of the data was asked.
        control: name of the control that changed the images, None for the real ones.
    """
    if benchmark.scored:
        return
    path = output / f"{benchmark.name}_for_submission.json"
    write_json(path, benchmark.submission(records))
    failed = sum(record["error"] is not None for record in records)
    faults = [] if whole else [f"--limit took the first {len(records)} questions"]
    if control is not None:
        faults.append(f"the images were changed by --control {control}")
    if failed:
        faults.append(f"{failed} questions could not be asked and have no answer")
    if faults:
        warn(f"{benchmark.name}: {path} is not for upload: {'; '.join(faults)}")
    else:
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
    """Records of an earlier run that are answers to the same questions, see `Item.is_of`.

    Raises:
        CommandError: a row is another question now.
    """
    usable = []
    for record in (record for part in _parts(path) for record in read_records(part)):
        item = items.get(record["index"])
        if item is None or record["error"] is not None:
            continue  # tried again
        if not item.is_of(record):
            raise CommandError(
                f"{path}: row {record['index']} is another question now or shows another image, "
                "the data has changed; give another --output, or start again with --overwrite"
            )
        usable.append(record)
    return usable


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
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
