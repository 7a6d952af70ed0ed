"""Several benchmarks on one model, into one result folder with its ``results.json``."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from proxyv.cli import add_model_options
from proxyv.eval.answerer import Answerer
from proxyv.eval.benchmarks import BENCHMARKS, GROUPS, averages
from proxyv.eval.runner import RunOptions, evaluate, open_output
from proxyv.eval.sources import Rows
from proxyv.eval.team import ALONE, Team
from proxyv.files import read_json, write_json
from proxyv.provenance import fingerprint, git_commit, hardware, versions

__all__ = ["add_task_options", "score_tasks"]


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """What a command asks, how, and with what kind of numbers; not which model."""
    add = parser.add_argument
    names = ", ".join([*BENCHMARKS, *GROUPS])
    add("--tasks", required=True, help=f"names with commas between: {names}")
    add("--data", type=Path, help="folder with a folder for each task (default: the hub)")
    add("--batch-size", type=int, default=16, help="questions at a time (default: 16)")
    add("--limit", type=int, help="only the first N rows of each task")
    add_model_options(parser)
    add("--overwrite", action="store_true", help="start again, discard results in the folder")
    add("--json", action="store_true", help="print JSON instead of the table")


def score_tasks(
    model: str,
    answerer: Answerer,
    tables: Mapping[str, Rows],
    options: RunOptions,
    output: Path,
    warn: Callable[[str], None],
    *,
    data: Path | None = None,
    team: Team = ALONE,
    overwrite: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Ask and score what the folder does not hold yet, and write ``results.json``.

    Args:
        model: folder or hub id that the answerer was loaded from.
        answerer: the model.
        tables: rows of each benchmark, by its name.
        options: how it is asked.
        output: result folder; tasks that it holds already stay in the results.
        warn: takes lines for the user.
        data: folder that the tables come from, for reports that show pictures.
        team: of processes.
        overwrite: discard what the folder holds.
        changes: what else the answers depend on, such as an attention that was masked.

    Returns:
        The content of ``results.json``.

    Raises:
        CommandError: the folder holds a run with other settings.
    """
    options = dataclasses.replace(options, batch_tokens=answerer.batch_tokens)
    settings = _settings(model, answerer, options) | dict(changes or {})
    if team.is_first:
        open_output(output, settings, overwrite=overwrite)
    team.wait()
    started = time.monotonic()
    place = str(data.resolve()) if data else None
    tasks = {
        name: {
            **evaluate(BENCHMARKS[name], rows, answerer, options, output, warn, team),
            "data_folder": place,
        }
        for name, rows in tables.items()
    }
    results = _results(model, settings, answerer, _earlier_tasks(output) | tasks)
    results["seconds"] = round(time.monotonic() - started, 1)
    results["hardware"]["processes"] = team.size
    if team.is_first:
        write_json(output / "results.json", results)
    return results


def _settings(model: str, answerer: Answerer, options: RunOptions) -> dict[str, Any]:
    """What the answers depend on; a run is resumed only where all of it is equal."""
    folder = Path(model)
    return {
        "weights": fingerprint(folder) if folder.is_dir() else model,
        **answerer.describe(),
        **dataclasses.asdict(options),
    }


def _earlier_tasks(output: Path) -> dict[str, Any]:
    """Tasks of an earlier command with the same settings, which stay in the results."""
    path = output / "results.json"
    if not path.is_file():
        return {}
    return read_json(path, "delete it and start the command again")["tasks"]


def _results(
    model: str, settings: dict[str, Any], answerer: Answerer, tasks: dict[str, Any]
) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "model": model,
        "tasks": tasks,
        "averages": averages(tasks),
        "settings": settings,
        "prompt_template": answerer.describe()["template"],
        "config": answerer.model.config.to_dict(),
        "versions": versions(),
        "git_commit": git_commit(),
        "hardware": hardware(answerer.device),
        "date": now.isoformat(timespec="seconds"),
    }
