"""Evaluate a model on benchmarks: ``python -m proxyv.eval --model DIR --tasks docvqa,chartqa``.

``python -m proxyv.eval rescore RUN`` scores the stored answers of a run again, without the model;
``python -m proxyv.eval report RUN...`` compares runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from proxyv.cli import CommandError, model_options, nearest, run_command, table_console
from proxyv.eval.answerer import Answerer, check_model_name
from proxyv.eval.benchmarks import GROUPS, select
from proxyv.eval.controls import CONTROLS, check_control
from proxyv.eval.report import main as report_main
from proxyv.eval.rescore import main as rescore_main
from proxyv.eval.runner import RunOptions
from proxyv.eval.sources import load_rows
from proxyv.eval.tables import results_table
from proxyv.eval.tasks import add_task_options, score_tasks
from proxyv.eval.team import join_team, own_gpu
from proxyv.reduction.options import HELP as REDUCTION_HELP
from proxyv.reduction.options import parse_options

__all__ = ["main"]

SHOWN_FAILURES = 5
COMMANDS = {"report": report_main, "rescore": rescore_main}


def build_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m proxyv.eval",
        description="Score a model on benchmarks. A run that was stopped goes on where it was.",
        epilog=f"""examples:
  python -m proxyv.eval --model DIR --tasks docvqa,chartqa --data data/generated
  python -m proxyv.eval --model DIR --tasks score_fine --control blank-images
  accelerate launch --num_processes 8 -m proxyv.eval --model DIR --tasks refcoco
  python -m proxyv.eval report RUN...    compares runs (RUN: a result folder)
  python -m proxyv.eval rescore RUN...   scores stored answers again, without model

groups of tasks, whose average is given as well:
{_group_help()}""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="model folder, or hub id")
    add_task_options(parser)
    add("--reduction", help=f"{REDUCTION_HELP} (default: the model's own)")
    add("--output", type=Path, help="result folder (default: runs/eval/<model>[-<control>])")
    add("--control", help=f"change the images: {', '.join(CONTROLS)}")
    add("--seed", type=int, default=0, help="seed of the shuffled images (default: 0)")
    return parser


def _group_help() -> str:
    return "\n".join(f"  {group} = {', '.join(members)}" for group, members in GROUPS.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 1 where a sample could not be asked, else 0."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        if argv[0] not in COMMANDS:
            raise CommandError(nearest("command", argv[0], COMMANDS))
        return COMMANDS[argv[0]](argv[1:])
    args = build_parser().parse_args(argv)
    benchmarks = select(args.tasks)
    options = RunOptions(args.batch_size, args.limit, check_control(args.control), args.seed)
    check_model_name(args.model)
    team = join_team(args.device)
    tables = {benchmark.name: load_rows(benchmark, args.data) for benchmark in benchmarks}
    args.device = args.device or own_gpu(team)
    answerer = Answerer.load(args.model, **model_options(args), **_reduction(args.reduction))
    output = args.output or _default_output(args.model, args.control, args.reduction)
    console = Console(
        stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=not team.is_first
    )
    results = score_tasks(
        args.model,
        answerer,
        tables,
        options,
        output,
        console.print,
        data=args.data,
        team=team,
        overwrite=args.overwrite,
    )
    tasks = {name: results["tasks"][name] for name in tables}
    if not team.is_first:
        return _report_failures(tasks, console)
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    else:
        table_console().print(results_table(results))
    console.print(f"written: {output / 'results.json'}")
    return _report_failures(tasks, console)


def _reduction(given: str | None) -> dict[str, Any]:
    """The argument of ``Answerer.load`` that the option makes, if it was given."""
    return {} if given is None else {"reduction": parse_options(given)}


def _default_output(model: str, control: str | None, reduction: str | None) -> Path:
    path = Path(model)
    stage = path.name in ("pretrain", "finetune")  # of many models
    if stage or not path.name:
        path = path.resolve()
    name = f"{path.parent.name}-{path.name}" if stage else path.name
    if reduction is not None:
        name += f"-{(parse_options(reduction) or {}).get('method', 'none')}"
    return Path("runs", "eval", f"{name}-{control}" if control else name)


def _report_failures(tasks: dict[str, Any], console: Console) -> int:
    failed = [f"{name} {error}" for name, task in tasks.items() for error in task["errors"]]
    for line in failed[:SHOWN_FAILURES]:
        console.print(f"failed: {line}")
    if failed:
        console.print(
            f"error: {len(failed)} samples could not be asked and count as wrong (all reasons are "
            "in results.json)"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
