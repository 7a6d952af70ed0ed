"""Questions that a reduced model gets wrong and another does not, with what it kept (figure 5)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from proxyv.cli import CommandError, message_console
from proxyv.eval.answerer import Answerer
from proxyv.eval.benchmarks import BENCHMARKS, Record
from proxyv.eval.plan import item_images, make_items
from proxyv.eval.sources import load_rows
from proxyv.eval.stored import StoredRun, load_run
from proxyv.study.kept import data_uri, draw_kept, kept_patches
from proxyv.study.scores import model_config, run_name, shared_tasks

__all__ = ["add_options", "failures", "run"]

RIGHT = 0.5  # scores from here on count as right


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m proxyv.study gallery``."""
    add = parser.add_argument
    add("reduced", type=Path, metavar="RUN_REDUCED", help="result folder of a reduced model")
    add("other", type=Path, metavar="RUN_PROXYV", help="result folder of ProxyV on the same tasks")
    add("--data", type=Path, help="where the images are (default: where the runs had them)")
    add("--model", help="the reduced model (default: where its run had it)")
    add("--samples", type=int, default=40, help="most questions on the page (default: 40)")
    add(
        "--output",
        type=Path,
        default=Path("runs", "study", "gallery.html"),
        help="the page (default: runs/study/gallery.html)",
    )
    add("--device", help="cpu, cuda, cuda:1 (default: the first GPU, if any)")


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    if args.samples < 1:
        raise CommandError(f"--samples {args.samples}: a whole number from 1 on is needed")
    runs = [load_run(args.reduced), load_run(args.other)]
    method = model_config(runs[0]).reduction_method
    if method is None:
        raise CommandError(f"{args.reduced}: its model has no token reduction")
    found = failures(runs[0], runs[1])
    settings = runs[0].results["settings"]
    answerer = Answerer.load(
        args.model or runs[0].results["model"],
        dtype=settings["dtype"],
        attention=settings["attention"],
        device=args.device,
        template=settings["template"],
        reduction=method.options(),  # which an evaluation may have set for an unreduced model
    )
    warn = message_console().print
    samples = [
        _sample(runs, task, pair, answerer, args.data, warn) for task, pair in found[: args.samples]
    ]
    names = run_name(runs[0]), run_name(runs[1])
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = files("proxyv.study").joinpath("gallery.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        title=f"Where {names[0]} fails and {names[1]} does not",
        reduced=names[0],
        other=names[1],
        samples=samples,
        found=len(found),
        asked=sum(len(runs[0].records[task]) for task in shared_tasks(runs)),
        facts=f"{runs[0].results['model']} with {method.options()}; {runs[1].results['model']}",
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(page, encoding="utf-8")
    warn(f"{len(found)} questions found, {len(samples)} on the page; written: {args.output}")
    return 0


def failures(reduced: StoredRun, other: StoredRun) -> list[tuple[str, tuple[Record, Record]]]:
    """Questions that the first run gets wrong and the second one right, the clearest first.

    Raises:
        CommandError: the runs have no scored task in common, or were asked other questions.
    """
    found = []
    for task in shared_tasks([reduced, other]):
        for record, partner in zip(reduced.records[task], other.records[task], strict=True):
            if record["error"] is None and record["score"] < RIGHT <= partner["score"]:
                found.append((task, (record, partner)))
    return sorted(found, key=lambda entry: entry[1][0]["score"] - entry[1][1]["score"])


def _sample(
    runs: Sequence[StoredRun],
    task: str,
    pair: tuple[Record, Record],
    answerer: Answerer,
    data: Path | None,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """What the page shows of a question."""
    benchmark, record = BENCHMARKS[task], pair[0]
    place = data or runs[0].results["tasks"][task].get("data_folder")
    picture, kept = None, "the picture cannot be had"
    try:
        rows = load_rows(benchmark, Path(place) if place else None)
        index = record["index"]
        if index >= len(rows):
            raise CommandError(f"{rows.origin} has {len(rows)} rows, the run was asked row {index}")
        items, bad = make_items(benchmark, rows, [index], answerer)
        if bad:
            raise CommandError(bad[0]["error"])
        if not items[0].is_of(record):
            raise CommandError(
                f"row {index} of {rows.origin} is not what the run was asked, or not with its image"
            )
        images = item_images(benchmark, rows, items[0])
        patches = kept_patches(answerer, record["prompt"], images)
        picture = data_uri(draw_kept(answerer, images[0], patches))
        kept = "every token stands for several patches"
        if patches is not None:
            kept = f"{int(patches.sum())} of {patches.numel()} patches kept"
    except (ValueError, OSError) as error:
        warn(f"{task}, question {record['question_id']}: no picture ({error})")
    return {
        "task": task,
        "id": record["question_id"],
        "question": record["question"],
        "references": record["references"],
        "answers": [own["answer"] for own in pair],
        "scores": [own["score"] for own in pair],
        "picture": picture,
        "kept": kept,
    }
