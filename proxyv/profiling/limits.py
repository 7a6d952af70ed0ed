"""What the measurements should show, in one table, and what they did show.

``scripts/benchmark.sh`` writes the reports that are looked up here by name. On a CPU that is a
Llama of 16 layers, D 1024, 16 heads, FFN 2752, float32, sdpa, 5 crops and 50 text tokens (40
crops in ``cpu-large``), against stock ``LlamaModel`` in the same process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxyv.profiling.report import Plot, Report

__all__ = ["LIMITS", "POINTS", "Limit", "limits_report"]


@dataclass(frozen=True)
class Limit:
    """What a number of a report must not exceed.

    Attributes:
        report: its name.
        operation: column "operation" of the row; None where a report has no such column.
        arm: column "arm" of the row; None where the number belongs to the whole process.
        column: where the number is.
        at_most: the limit.
    """

    report: str
    operation: str | None
    arm: str | None
    column: str
    at_most: float


LIMITS = (
    Limit("cpu-prefill", "prefill", "ProxyV-L8", "time ratio", 0.64),
    Limit("cpu-prefill", "prefill", "ProxyV-L6", "time ratio", 0.53),
    Limit("cpu-training", "training step", "ProxyV-L8", "time ratio", 0.66),
    Limit("cpu-decode", "decode step", "ProxyV-L8", "time ratio", 1.02),
    Limit("cpu-decode", "decode step", "ProxyV-L6", "time ratio", 1.02),
    Limit("cpu-memory", None, "ProxyV-L8", "prefill ratio", 1.0),
    Limit("cpu-memory", None, "ProxyV-L6", "prefill ratio", 1.0),
    Limit("cpu-memory", None, "ProxyV-L8", "training ratio", 0.75),
    Limit("cpu-memory", None, "ProxyV-L6", "training ratio", 0.75),
    Limit("cpu-large", "prefill", "ProxyV-L8", "time ratio", 0.60),
    Limit("cpu-large", "prefill", "ProxyV-L6", "time ratio", 0.48),
    Limit("cpu-large", None, None, "process_peak_mib", 12e9 / (1 << 20)),
    Limit("gpu-vicuna-7b-sdpa-b1", "prefill", "ProxyV-L12", "time ratio", 0.60),
    Limit("gpu-vicuna-7b-sdpa-b1", "prefill", "ProxyV-L16", "time ratio", 0.69),
    Limit("gpu-vicuna-7b-eager-b1", "prefill", "ProxyV-L12", "time ratio", 0.63),
    Limit("gpu-vicuna-7b-eager-b1", "prefill", "ProxyV-L16", "time ratio", 0.73),
)
POINTS = 4.0
"""Points of FLOPs saved that may be missing from the time saved on a CPU, above 20 % saved."""


def limits_report(folder: Path) -> Report:
    """Every limit beside what the reports of a folder say.

    Args:
        folder: holds their JSON files.

    Raises:
        ValueError: none of the reports is there.
    """
    reports = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    reports = {name: found for name, found in reports.items() if "plot" in found}
    named = {limit.report for limit in LIMITS}
    if not named & set(reports):
        raise ValueError(
            f"{folder} has none of the reports {', '.join(sorted(named))}: "
            "run bash scripts/benchmark.sh first"
        )
    rows = [_line(limit, reports) for limit in LIMITS if limit.report in reports]
    rows += [line for name, found in reports.items() for line in _saved_lines(name, found)]
    missing = sorted(named - set(reports))
    measured = [line for line in rows if line["measured"] is not None]
    ratios = [line for line in measured if line["column"].endswith("ratio")]
    return Report(
        name="limits",
        title="Measured, against what it should be",
        rows=rows,
        notes="Ratios to the stock model of the same process. Time saved - FLOPs saved, in "
        "points, is looked at where more than 20 % of the FLOPs as run are saved. Spread: of the "
        "arm's own rounds; with a large one the machine was busy."
        + (f" Not measured: {', '.join(missing)}." if missing else ""),
        plot=Plot(
            x=[f"{line['report']} {line['arm'].removeprefix('ProxyV-')}" for line in ratios],
            series={name: [line[name] for line in ratios] for name in ("measured", "limit")},
            y_label="ratio to the stock model",
        ),
    )


def _line(limit: Limit, reports: dict[str, Any]) -> dict[str, Any]:
    """One limit; a report that lacks its row (other start layers, say) says so."""
    found = reports[limit.report]
    rows = [found] if limit.arm is None else found["rows"]
    if limit.arm is not None:
        asked = (limit.arm, limit.operation)
        rows = [row for row in rows if (row["arm"], row.get("operation")) == asked]
    value = next((row[limit.column] for row in rows if limit.column in row), None)
    return {
        "report": limit.report,
        "operation": limit.operation or "",
        "arm": limit.arm or "process",
        "column": limit.column,
        "measured": value,
        "limit": limit.at_most,
        "spread %": _spread(rows[0]) if rows else None,
        "verdict": "not measured" if value is None else _verdict(value <= limit.at_most),
        "made": _made(found),
    }


def _saved_lines(name: str, report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Time saved against FLOPs saved, for the timed rows of a CPU's report."""
    if report["settings"].get("device") != "cpu":
        return
    for row in report["rows"]:
        if row.get("FLOPs saved %", 0.0) <= 20 or "time saved %" not in row:
            continue
        points = row["time saved %"] - row["FLOPs saved %"]
        crops = f", {row['crops']} crops" if "crops" in row else ""
        yield {
            "report": name,
            "operation": row["operation"] + crops,
            "arm": row["arm"],
            "column": "time saved - FLOPs saved",
            "measured": points,
            "limit": -POINTS,
            "spread %": _spread(row),
            "verdict": _verdict(points >= -POINTS),
            "made": _made(report),
        }


def _made(report: dict[str, Any]) -> str:
    """Day, commit and device of a report; not those of the table that collects it."""
    device = report.get("hardware", {}).get("device", "")
    commit = (report.get("commit") or "no commit")[:7]
    return f"{report.get('date', '')[:10]} {commit} {device}".strip()


def _spread(row: dict[str, Any]) -> float | None:
    """How far the rounds lie apart, in percent of their median; None where nothing was timed."""
    return 100 * row["spread ms"] / row["median ms"] if "spread ms" in row else None


def _verdict(holds: bool) -> str:
    return "holds" if holds else "DOES NOT HOLD"
