"""Any number of models or token-reduction methods side by side: score, FLOPs, time, memory."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from proxyv.cli import CommandError, message_console, model_options
from proxyv.config import ProxyVConfig
from proxyv.eval.answerer import Answerer, check_model_name, model_type
from proxyv.eval.runner import RunOptions
from proxyv.eval.sources import Rows, load_rows
from proxyv.eval.stored import StoredRun, load_run
from proxyv.eval.tasks import add_task_options, score_tasks
from proxyv.model.released import is_release
from proxyv.profiling.report import Plot, Report
from proxyv.reduction.options import parse_options
from proxyv.study.cost import Cost, measure_cost
from proxyv.study.publish import publish
from proxyv.study.scores import difference, run_name, score_run, select_averaged

__all__ = ["Entry", "add_options", "comparison_report", "parse_entry", "run"]

_MIB = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A model to compare.

    Attributes:
        name: of its row and its folder.
        model: folder or hub id.
        fields: of its configuration that are set otherwise.
    """

    name: str
    model: str
    fields: dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m proxyv.study compare``."""
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="NAME=MODEL[@REDUCTION]",
        help="a model folder under a name of its own, and what to reduce it by: method=fastv,"
        "layer=2,ratio=0.5, or as JSON, or none; the first one is what the others are compared to",
    )
    add_task_options(parser)
    add("--output", type=Path, default=Path("runs", "study", "compare"), help="folder")
    add("--crops", type=int, default=5, help="of the prompt whose cost is measured (default: 5)")
    add("--text", type=int, default=50, help="its text tokens (default: 50)")
    add("--repeats", type=int, default=5, help="timed rounds (default: 5)")


def parse_entry(given: str) -> Entry:
    """Read ``NAME=MODEL`` or ``NAME=MODEL@REDUCTION``.

    Raises:
        CommandError: another form.
    """
    name, sign, rest = given.partition("=")
    model, reduced, options = rest.partition("@")
    if not sign or not name or not model or "/" in name or name.startswith("."):
        raise CommandError(f"{given!r}: write NAME=MODEL or NAME=MODEL@method=fastv,layer=2")
    return Entry(name, model, {"reduction": parse_options(options)} if reduced else {})


def run(args: argparse.Namespace) -> int:
    """Score every model that the folder does not hold yet, measure all, and write the table."""
    entries = [parse_entry(given) for given in args.models]
    for name in ("crops", "text", "repeats"):
        if getattr(args, name) < 1:
            raise CommandError(f"--{name} {getattr(args, name)}: must be at least 1")
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise CommandError(f"{', '.join(names)}: give each model a name of its own")
    benchmarks = select_averaged(args.tasks)
    options = RunOptions(args.batch_size, args.limit)
    for entry in entries:
        _check(entry)
    tables = {benchmark.name: load_rows(benchmark, args.data) for benchmark in benchmarks}
    warn = message_console().print
    found = [_look_at(entry, args, tables, options, warn) for entry in entries]
    report = comparison_report(
        names, [run_ for run_, _ in found], [cost for _, cost in found], list(tables)
    )
    publish(report, args, args.output)
    return 0


def _check(entry: Entry) -> None:
    """Refuse a model that cannot be compared, before hours are spent on those before it.

    Raises:
        CommandError: no such model, or one whose rows are no crops.
        ValueError: a method that does not go with its configuration.
    """
    check_model_name(entry.model)
    if model_type(entry.model) == ProxyVConfig.model_type and is_release(entry.model):
        return
    config = AutoConfig.from_pretrained(entry.model, **entry.fields)
    if not isinstance(config, ProxyVConfig) or config.packing != "crops":
        raise CommandError(
            f"{entry.name}: the image rows of {entry.model} are no crops, whose cost could be "
            "compared; python -m proxyv.eval scores it alone"
        )
    config.check_options()


def _look_at(
    entry: Entry,
    args: argparse.Namespace,
    tables: dict[str, Rows],
    options: RunOptions,
    warn: Callable[[str], None],
) -> tuple[StoredRun, Cost]:
    """Score a model and measure it; only one is in memory at a time."""
    answerer = Answerer.load(entry.model, **model_options(args), **entry.fields)
    args.device = str(answerer.device)
    folder = args.output / entry.name
    warn(f"{entry.name}: {folder}")
    score_tasks(
        entry.model,
        answerer,
        tables,
        options,
        folder,
        warn,
        data=args.data,
        overwrite=args.overwrite,
    )
    return load_run(folder), measure_cost(answerer.model, args.crops, args.text, args.repeats)


def comparison_report(
    names: Sequence[str], runs: Sequence[StoredRun], costs: Sequence[Cost], tasks: Sequence[str]
) -> Report:
    """The table.

    Args:
        names: of the models; the first one is what the others are compared to.
        runs: their finished runs.
        costs: what a prompt costs each.
        tasks: the tasks whose scores are averaged.
    """
    scores = [score_run(run_, tasks) for run_ in runs]
    rows: list[dict[str, Any]] = []
    for name, run_, score, cost in zip(names, runs, scores, costs, strict=True):
        gap = difference(score, scores[0])
        rows.append(
            {
                "name": name,
                "model": run_name(run_),
                **{f"{task} %": score.tasks[task] for task in tasks if len(tasks) > 1},
                "score %": score.value,
                "from": score.interval[0],
                "to": score.interval[1],
                "gap": gap.value,
                "p": gap.p_value,
                "GFLOPs": cost.decoder_flops / 1e9,
                "saved %": 100 * (1 - cost.decoder_flops / costs[0].decoder_flops),
                "prefill ms": 1000 * cost.prefill.median,
                "spread ms": 1000 * cost.prefill.spread,
                "time saved %": 100 * (1 - cost.prefill.median / costs[0].prefill.median),
                "peak MiB": cost.peak_bytes / _MIB,
            }
        )
    return Report(
        name="compare",
        title=f"Models side by side, the first is {names[0]}",
        rows=rows,
        notes=f"Score: mean of {', '.join(tasks)}, with its 95 % bootstrap interval; gap to the "
        "first, p from a paired permutation test. FLOPs: counted in the decoder with eager "
        "attention (S x S), guided updates folded. Prefill: vision tower, decoder and one row of "
        "logits, median and spread of the repeats; models are measured one after another. Peak: "
        "above the weights.",
        plot=Plot(
            x=list(names),
            series={"score": [score.value for score in scores]},
            y_label="score, %",
            intervals={"score": [score.interval for score in scores]},
        ),
    )
