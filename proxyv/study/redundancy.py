"""How many of the last layers a trained model can do without vision attention (figure 2)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from proxyv.cli import CommandError, message_console, model_options
from proxyv.eval.answerer import Answerer, check_model_name
from proxyv.eval.runner import RunOptions
from proxyv.eval.sources import Rows, load_rows
from proxyv.eval.stored import StoredRun, load_run
from proxyv.eval.tasks import add_task_options, score_tasks
from proxyv.profiling.report import Plot, Report
from proxyv.study.masking import HIDDEN, masked_layers
from proxyv.study.publish import publish
from proxyv.study.scores import difference, score_run, select_averaged

__all__ = ["add_options", "curve_report", "layer_counts", "run"]

RATIOS = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m proxyv.study redundancy``."""
    add = parser.add_argument
    add("--model", required=True, help="model folder, or hub id")
    add_task_options(parser)
    add("--ratios", default=RATIOS, help=f"shares of layers, from the last one (default: {RATIOS})")
    add(
        "--hide",
        choices=HIDDEN,
        default="vision",
        help="what vision tokens do not see there: other vision tokens, or all others "
        "(default: vision)",
    )
    add("--output", type=Path, help="folder (default: runs/study/<run>-<model>-<hide>)")


def run(args: argparse.Namespace) -> int:
    """Score the model at every ratio that the folder does not hold yet, and draw the curve."""
    ratios = _ratios(args.ratios)
    benchmarks = select_averaged(args.tasks)
    options = RunOptions(args.batch_size, args.limit)
    check_model_name(args.model)
    tables = {benchmark.name: load_rows(benchmark, args.data) for benchmark in benchmarks}
    answerer = Answerer.load(args.model, **model_options(args))
    args.device = str(answerer.device)
    depth = answerer.model.config.text_config.num_hidden_layers
    output = args.output or _default_output(args.model, args.hide)
    warn = message_console().print
    runs = [
        _score_masked(args, answerer, tables, options, output, number, warn)
        for number in layer_counts(ratios, depth)
    ]
    publish(curve_report(runs, list(tables)), args, output)
    return 0


def _default_output(model: str, hide: str) -> Path:
    """Named by the last two parts, because the folders of many runs are called finetune."""
    return Path("runs", "study", "-".join([*Path(model).resolve().parts[-2:], hide]))


def _score_masked(
    args: argparse.Namespace,
    answerer: Answerer,
    tables: dict[str, Rows],
    options: RunOptions,
    output: Path,
    number: int,
    warn: Callable[[str], None],
) -> StoredRun:
    """The run with so many layers masked; what its folder holds is not asked again."""
    folder = output / f"masked-{number:02d}"
    warn(f"{number} layers masked: {folder}")
    with masked_layers(answerer.model, number, args.hide) as layers:
        score_tasks(
            args.model,
            answerer,
            tables,
            options,
            folder,
            warn,
            data=args.data,
            overwrite=args.overwrite,
            changes={"masked_layers": number, "masked": layers, "hidden": args.hide},
        )
    return load_run(folder)


def layer_counts(ratios: Sequence[float], depth: int) -> list[int]:
    """Numbers of layers for shares of them, each once, 0 always among them."""
    return sorted({0, *(round(ratio * depth) for ratio in ratios)})


def curve_report(runs: Sequence[StoredRun], tasks: Sequence[str]) -> Report:
    """The curve.

    Args:
        runs: one for each number of masked layers; the first one masks none.
        tasks: the tasks whose scores are averaged.
    """
    scores = [score_run(run, tasks) for run in runs]
    rows: list[dict[str, Any]] = []
    for run_, score in zip(runs, scores, strict=True):
        settings = run_.results["settings"]
        depth = run_.results["config"]["text_config"]["num_hidden_layers"]
        gap = difference(score, scores[0])
        rows.append(
            {
                "ratio": settings["masked_layers"] / depth,
                "layers": settings["masked_layers"],
                "masked": len(settings["masked"]),
                **{f"{task} %": value for task, value in score.tasks.items()},
                "score %": score.value,
                "from": score.interval[0],
                "to": score.interval[1],
                "of base %": _relative(score.value, scores[0].value),
                "gap": gap.value,
                "p": gap.p_value,
            }
        )
    hidden = runs[0].results["settings"]["hidden"]
    return Report(
        name="redundancy",
        title=f"Vision tokens that do not see {_what(hidden)} in the last layers: "
        f"{runs[0].results['model']}",
        rows=rows,
        notes=f"Nothing is trained. Score: mean of {', '.join(tasks)}, with its 95 % bootstrap "
        "interval; gap to no masking, p from a paired permutation test. Layers are "
        "counted from the last one; masked are those among them whose vision tokens are queries.",
        plot=Plot(
            x=[row["ratio"] for row in rows],
            series={"score": [score.value for score in scores]},
            y_label="score, %",
            x_label="share of layers masked, from the last one",
            lines=True,
            intervals={"score": [score.interval for score in scores]},
        ),
    )


def _what(hidden: str) -> str:
    return "other vision tokens" if hidden == "vision" else "any other token"


def _relative(value: float, base: float) -> float | None:
    """Percent of a base; None where that is 0."""
    return 100 * value / base if base else None


def _ratios(given: str) -> list[float]:
    try:
        ratios = [float(part) for part in given.split(",")]
    except ValueError:
        ratios = [-1.0]
    if not all(0 <= ratio <= 1 for ratio in ratios):
        raise CommandError(f"--ratios {given!r}: write shares from 0 to 1, such as 0,0.25,0.5")
    return ratios
