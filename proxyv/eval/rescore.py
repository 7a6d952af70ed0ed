"""Score the stored answers of a run again: ``python -m proxyv.eval rescore RUN``.

The result files hold all that a score depends on, so neither the model nor the data is needed:
after a change of a metric, old runs get its numbers in seconds.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from proxyv.cli import message_console, table_console
from proxyv.eval.benchmarks import BENCHMARKS, Benchmark, Record, averages
from proxyv.eval.metrics import final_answer
from proxyv.eval.records import rewrite_records
from proxyv.eval.runner import summarise, write_submission
from proxyv.eval.stored import load_run
from proxyv.eval.tables import results_table
from proxyv.files import write_json
from proxyv.provenance import git_commit

__all__ = ["main", "rescore"]


def build_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m proxyv.eval rescore",
        description="Score the stored answers of runs again, without model and data.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="result folder of a run")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    console = message_console()
    for run in args.runs:
        results = rescore(run, console.print)
        if args.json:
            print(json.dumps(results, indent=2, ensure_ascii=False))
        else:
            table_console().print(results_table(results))
    return 0


def rescore(run: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """Score every stored answer of a run again and bring its files up to date.

    Args:
        run: the output folder of a run.
        warn: takes one line on each score that has changed.

    Returns:
        The new content of ``results.json``.

    Raises:
        CommandError: there is no finished run in the folder.
    """
    stored = load_run(run)
    results = stored.results
    limit, control = (results["settings"].get(name) for name in ("limit", "control"))
    for name, task in results["tasks"].items():
        benchmark = BENCHMARKS[name]
        scored = [_scored(benchmark, record) for record in stored.records[name]]
        rewrite_records(run / f"{name}.jsonl", scored)
        if "rows" in task:
            whole = len(scored) == task["rows"]
        else:  # older results do not say; where as many as the limit were asked, there may be more
            whole = limit is None or len(scored) < limit
        write_submission(benchmark, scored, run, warn, whole=whole, control=control)
        summary = summarise(benchmark, scored)
        _report_changes(name, task, summary, warn)
        task.update(summary)
    results["averages"] = averages(results["tasks"])
    now = datetime.datetime.now(datetime.timezone.utc)
    results["rescored"] = {"date": now.isoformat(timespec="seconds"), "git_commit": git_commit()}
    write_json(run / "results.json", results)
    return results


def _scored(benchmark: Benchmark, record: Record) -> Record:
    if not benchmark.scored or record["error"] is not None or record["answer"] is None:
        return record
    answer = final_answer(record["answer"])
    score = benchmark.score(answer, record["references"], record.get("details"))
    return {**record, "score": score}


def _report_changes(
    name: str, before: dict[str, Any], after: dict[str, Any], warn: Callable[[str], None]
) -> None:
    for score, entry in after["scores"].items():
        old = before["scores"].get(score, {}).get("value")
        if old != entry["value"]:
            warn(f"{name}: {score} was {old}, is {entry['value']}")
