"""Tables 1 and 2 from finished runs: what is lost and saved where vision tokens skip work."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proxyv.cli import CommandError
from proxyv.config import ProxyVConfig
from proxyv.eval.stored import StoredRun, load_run
from proxyv.model.flops import RowTokens, paper_flops
from proxyv.profiling.report import Plot, Report
from proxyv.profiling.shapes import arm_name, with_start
from proxyv.study.publish import publish
from proxyv.study.scores import difference, model_config, run_name, score_run, shared_tasks

__all__ = ["add_options", "run", "skip_reports"]

_TABLES = {
    "atn": ("table1", "Attention of vision tokens skipped"),
    "atn_ffn": ("table2", "Attention and FFN of vision tokens skipped"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m proxyv.study table``."""
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="result folders of python -m proxyv.eval, the baseline first, or of single ratios of "
        "the redundancy study (masked-16)",
    )
    add("--output", type=Path, default=Path("runs", "study"), help="folder (default: runs/study)")
    add("--crops", type=int, default=5, help="of the FLOPs column (default: 5)")
    add("--text", type=int, default=50, help="text tokens of the FLOPs column (default: 50)")
    add(
        "--latency",
        type=Path,
        help="latency.json of python -m proxyv.profiling latency --skip atn,atn_ffn, for a column "
        "with the time that a prefill saves",
    )
    add("--json", action="store_true", help="print JSON instead of the tables")


def run(args: argparse.Namespace) -> int:
    """Write the tables that the runs belong to."""
    runs = [load_run(folder) for folder in args.runs]
    saved = None if args.latency is None else time_saved(args.latency)
    for report in skip_reports(runs, RowTokens(args.crops, args.text), saved):
        publish(report, args, args.output)
    return 0


def time_saved(file: Path) -> dict[str, float]:
    """Prefill time saved by each arm of a latency report, in percent.

    Raises:
        CommandError: another kind of file, or one without prefills.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        found = {r["arm"]: r["time saved %"] for r in rows if r["operation"] == "prefill"}
    except (json.JSONDecodeError, KeyError, TypeError):
        found = {}
    if not found:
        raise CommandError(
            f"--latency {file}: holds no prefills; give the latency.json that python -m "
            "proxyv.profiling latency --output FOLDER writes"
        )
    return found


def skip_reports(
    runs: Sequence[StoredRun], row: RowTokens, saved: Mapping[str, float] | None = None
) -> list[Report]:
    """Table 1 (attention) and table 2 (attention and FFN), each where there are runs for it.

    Args:
        runs: the baseline first; differences are from it.
        row: what the FLOPs column counts.
        saved: prefill time saved by name of arm, in percent; None for no such column.

    Raises:
        ValueError: the first run is no baseline, or no run belongs to a table.
    """
    kinds = [_kind(run) for run in runs]
    if run_name(runs[0]) != "baseline":
        raise ValueError(
            f"the first run, {runs[0].folder}, is {run_name(runs[0])}: give the baseline first"
        )
    reports = []
    for kind, (name, title) in _TABLES.items():
        chosen = [run for run, own in zip(runs, kinds, strict=True) if own == kind]
        if chosen:
            reports.append(_report(name, title, [runs[0], *chosen], row, saved))
    if not reports:
        raise ValueError(
            "no run belongs to table 1 or 2: give runs of models trained with model.skip=atn or "
            "atn_ffn, or of single ratios of the redundancy study"
        )
    return reports


def _kind(run: StoredRun) -> str | None:
    """The table that a run belongs to; masking at inference belongs to the first."""
    if run.results["settings"].get("masked_layers"):
        return "atn"
    return model_config(run).skip


def _report(
    name: str,
    title: str,
    runs: Sequence[StoredRun],
    row: RowTokens,
    saved: Mapping[str, float] | None,
) -> Report:
    tasks = shared_tasks(runs)
    scores = [score_run(run, tasks) for run in runs]
    rows: list[dict[str, Any]] = []
    for run_, score in zip(runs, scores, strict=True):
        gap = difference(score, scores[0])
        rows.append(
            {
                "run": run_name(run_),
                "how": _how(run_),
                "score %": score.value,
                "from": score.interval[0],
                "to": score.interval[1],
                "of base %": 100 * score.value / scores[0].value if scores[0].value else None,
                "gap": gap.value,
                "p": gap.p_value,
                "FLOPs saved %": _saved(run_, row),
            }
        )
        if saved is not None:
            rows[-1]["time saved %"] = saved.get(arm_name(_skipping(run_)))
    return Report(
        name=name,
        title=title,
        rows=rows,
        notes=f"Score: mean of {', '.join(tasks)}, with its 95 % bootstrap interval; gap to "
        "the baseline, p from a paired permutation test. FLOPs: the paper's count of a "
        f"prefill of {row.crops} crops and {row.text} text tokens, of layers that skip what is "
        "masked (masking alone saves nothing)."
        + ("" if saved is None else " Time: of a prefill of such layers, on random weights."),
        plot=Plot(
            x=[line["run"] for line in rows],
            series={"score": [score.value for score in scores]},
            y_label="score, %",
            intervals={"score": [score.interval for score in scores]},
        ),
    )


def _how(run: StoredRun) -> str:
    hidden = run.results["settings"].get("hidden")
    if run.results["settings"].get("masked_layers"):
        return f"training-free, {hidden} hidden"
    return "trained"


def _skipping(run: StoredRun) -> ProxyVConfig:
    """The configuration of a run; where attention was masked, that of layers that skip it."""
    config = model_config(run)
    masked = run.results["settings"].get("masked_layers")
    if not masked:
        return config
    return with_start(config, config.text_config.num_hidden_layers - masked, skip="atn")


def _saved(run: StoredRun, row: RowTokens) -> float:
    """FLOPs saved against the baseline of the same shape, in percent."""
    config = _skipping(run)
    fused = config.text_config.model_type == "phi3"
    base = paper_flops(with_start(config, None, skip=None), row, fused_qkv=fused)
    return 100 * (1 - paper_flops(config, row, fused_qkv=fused) / base)
