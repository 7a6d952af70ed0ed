r"""Look at a data set before training on it.

    python -m proxyv.data check    --annotations data/generated/llava_next/conversations.json \
                                   --images data/generated --write-clean clean.jsonl
    python -m proxyv.data inspect  --annotations data/generated/llava_next/conversations.json \
                                   --images data/generated --tokenizer data/tiny/language \
                                   --template tiny --crop-px 168 --row 3
    python -m proxyv.data bench    (the same options) --workers 0 1 2 --batch-size 16

``check`` reads every row and image and reports what is wrong, by part of the set; it ends with 1
where a row cannot be used. ``inspect`` shows a row as the model sees it, the supervised tokens in
green. ``bench`` measures how many rows a loading process makes ready in a second.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxyv.cli import CommandError, run_command, table_console
from proxyv.data.options import add_set_options, pipeline_of, processor_of

if TYPE_CHECKING:
    from rich.console import Console

    from proxyv.data.check import CheckReport
    from proxyv.data.readers import Source
    from proxyv.model.processing import ProxyVProcessor


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m proxyv.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = _command(commands, "check", "report missing, corrupt, useless and repeated rows")
    check.add_argument("--fast", action="store_true", help="read only the headers of images")
    check.add_argument(
        "--write-clean",
        type=Path,
        help="write the rows without errors, each once: .jsonl, or .txt of numbers",
    )
    check.add_argument("--examples", type=int, default=3, help="messages shown of each fault (3)")
    cores = min(os.cpu_count() or 1, 4)
    check.add_argument("--workers", type=int, default=cores, help=f"processes ({cores})")
    inspect = _command(commands, "inspect", "show one row as the model sees it")
    which = inspect.add_mutually_exclusive_group()
    which.add_argument("--row", type=int, default=0, help="number of the row (0)")
    which.add_argument("--id", help="id of the row")
    inspect.add_argument("--save-crops", type=Path, help="folder to write the crops to")
    bench = _command(commands, "bench", "measure the speed of loading")
    bench.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    bench.add_argument("--batch-size", type=int, default=16, help="rows of a batch (16)")
    bench.add_argument("--batches", type=int, default=20, help="batches to time (20)")
    bench.add_argument("--prefetch", type=int, default=4, help="batches a process keeps ready (4)")
    return parser.parse_args(argv)


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """Add a command with the options that all share."""
    parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=_example(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_set_options(parser)
    return parser


def _example(name: str) -> str:
    """The command's lines of the module's own examples."""
    lines = (__doc__ or "").split("\n\n")[1].splitlines()
    start = next(i for i, line in enumerate(lines) if f"proxyv.data {name}" in line)
    end = next((i for i in range(start + 1, len(lines)) if "python -m" in lines[i]), len(lines))
    return "example:\n" + "\n".join(lines[start:end])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see the module."""
    options = parse(argv)
    from proxyv.data.sources import open_source

    processor = processor_of(options)
    ratio = options.image_aspect_ratio if processor is None else processor.image_aspect_ratio
    source = open_source(
        options.annotations,
        options.images,
        streaming=options.streaming,
        max_megapixels=options.max_megapixels,
        follow_links=options.follow_links,
        squared=ratio == "pad",
    )
    console = table_console(soft_wrap=True)
    if options.command == "check":
        return _check(options, source, processor, console)
    if processor is None:
        raise CommandError(
            f"{options.command} needs a tokenizer: give --model RUN, or --tokenizer with --template"
        )
    return {"inspect": _inspect, "bench": _bench}[options.command](
        options, source, processor, console
    )


def _check(
    options: argparse.Namespace,
    source: Source,
    processor: ProxyVProcessor | None,
    console: Console,
) -> int:
    from proxyv.data.check import check_clean, check_source, write_clean

    if options.write_clean is not None:
        check_clean(source, options.write_clean)
    report = check_source(
        source,
        None if processor is None else pipeline_of(options, processor),
        decode=not options.fast,
        limit=options.limit,
        workers=options.workers,
        examples=options.examples,
        progress=sys.stderr.isatty(),
    )
    rows = sum(report.rows.values())
    if options.json:
        print(json.dumps(report.as_dict(), ensure_ascii=False, indent=1))
    else:
        console.print(_report_table(report, processor is not None))
        for kind in report.kinds:
            console.print(f"[bold]{kind}[/bold] ({report.total(kind):,})")
            for message in report.examples[kind]:
                console.print("  " + message, markup=False, highlight=False)
        if processor is None:
            console.print("lengths were not checked: give --tokenizer and --template, or --model")
        console.print(f"clean rows: {len(report.clean):,} of {rows:,}")
    if options.write_clean is not None:
        write_clean(source, report, options.write_clean)
        if not options.json:
            console.print(f"clean list: {options.write_clean}")
    return 0 if len(report.clean) == rows else 1


def _report_table(report: CheckReport, with_tokens: bool) -> Any:
    from rich.table import Table

    from proxyv.data.check import ERRORS

    table = Table(title="rows by part of the set")
    table.add_column("part", overflow="fold")
    for name in ("rows", "images", *(["mean tokens"] if with_tokens else [])):
        table.add_column(name, justify="right")
    for kind in report.kinds:
        table.add_column(kind, justify="right", style="red" if kind in ERRORS else "yellow")
    for name in sorted(report.rows):
        rows = report.rows[name]
        mean = [f"{report.tokens[name] / rows:,.0f}"] if with_tokens else []
        counts = [f"{report.faults[name][kind]:,}" for kind in report.kinds]
        table.add_row(name, f"{rows:,}", f"{report.images[name]:,}", *mean, *counts)
    return table


def _row_number(options: argparse.Namespace, source: Source) -> int:
    if options.id is None:
        if not 0 <= options.row < len(source):
            raise CommandError(f"--row {options.row}: there are {len(source)} rows, from 0 on")
        return options.row
    for index in range(len(source)):
        record = source.record(index)
        if isinstance(record, dict) and str(record.get("id")) == options.id:
            return index
    raise CommandError(f"--id {options.id}: no row has that id")


def _inspect(
    options: argparse.Namespace, source: Source, processor: ProxyVProcessor, console: Console
) -> int:
    from proxyv.data.inspection import inspect_row, save_crops

    row = source[_row_number(options, source)]
    pipeline = pipeline_of(options, processor)
    seen = inspect_row(row, pipeline, processor.tokenizer)
    files = []
    if options.save_crops is not None:
        images = processor.image_processor
        files = save_crops(row, pipeline, options.save_crops, images.image_mean, images.image_std)
    if options.json:
        crops = [str(file) for file in files]
        print(json.dumps({**seen.as_dict(), "crop_files": crops}, ensure_ascii=False))
        return 0
    for line in seen.header():
        console.print(line, markup=False, highlight=False)
    console.print("supervised tokens are in ", "⟦brackets, green⟧", sep="", style="bold green")
    console.print(seen.text())
    for file in files:
        console.print(f"crop: {file}", markup=False, highlight=False)
    return 0


def _bench(
    options: argparse.Namespace, source: Source, processor: ProxyVProcessor, console: Console
) -> int:
    from rich.table import Table

    from proxyv.data.collator import Collator
    from proxyv.data.dataset import ConversationDataset
    from proxyv.data.throughput import measure_throughput

    row = pipeline_of(options, processor)
    dataset = ConversationDataset(
        source, row.renderer, row.images, row.max_length, options.limit, "skip"
    )
    measured = [
        measure_throughput(
            dataset,
            Collator(row.renderer.end_token_id),
            options.batch_size,
            workers,
            options.batches,
            options.prefetch,
        )
        for workers in options.workers
    ]
    if options.json:
        print(json.dumps([one.as_dict() for one in measured], indent=1))
        return 0
    table = Table(title=f"loading, batches of {options.batch_size} rows")
    for name in (
        "processes",
        "rows/s",
        "rows/s each",
        "tokens/s",
        "MB a batch",
        "MB ready at most",
    ):
        table.add_column(name, justify="right")
    for one in measured:
        table.add_row(
            str(one.workers),
            f"{one.rows_per_second:,.1f}",
            f"{one.rows_per_second_per_worker:,.1f}",
            f"{one.tokens_per_second:,.0f}",
            f"{one.batch_bytes / 1e6:,.1f}",
            f"{one.prefetch_bytes / 1e6:,.1f}",
        )
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
