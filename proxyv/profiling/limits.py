"""What the measurements should show, in one table, and what they did show.

``scripts/benchmark.sh`` writes the reports that are looked up here by name. On a CPU that is a
Llama of 16 layers, D 1024, 16 heads, FFN 2752, float32, sdpa, 5 crops and 50 text tokens (40
crops in ``cpu-large``), against stock ``LlamaModel`` in the same process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxyv.profiling.report import Plot, Report
from proxyv.provenance import short_commit

__all__ = ["LIMITS", "POINTS", "Limit", "limits_report"]


SHAPE = {"crops": 5, "text": 50}
"""Vision crops and text tokens of a limit on time, where a report measures several."""


@dataclass(frozen=True)
class Limit:
    """What a number must not exceed in any report that has it.

    Attributes:
        reports: their names.
        operation: column "operation" of the row; None where a report has no such column.
        arm: column "arm" of the row; None where the number belongs to the whole process.
        column: where the number is.
        at_most: the limit.
        shape: columns "crops" and "text" of the row, where a report has them.
    """

    reports: tuple[str, ...]
    operation: str | None
    arm: str | None
    column: str
    at_most: float
    shape: Mapping[str, int] = field(default_factory=lambda: SHAPE)


PREFILL = ("cpu-prefill", "cpu-scaling", "cpu-text")
LARGE = {"crops": 40, "text": 50}
LIMITS = (
    Limit(PREFILL, "prefill", "ProxyV-L8", "time ratio", 0.64),
    Limit(PREFILL, "prefill", "ProxyV-L6", "time ratio", 0.53),
    Limit(("cpu-training",), "training step", "ProxyV-L8", "time ratio", 0.66),
    Limit(("cpu-decode",), "decode step", "ProxyV-L8", "time ratio", 1.02),
    Limit(("cpu-decode",), "decode step", "ProxyV-L6", "time ratio", 1.02),
    Limit(("cpu-memory",), None, "ProxyV-L8", "prefill ratio", 1.0),
    Limit(("cpu-memory",), None, "ProxyV-L6", "prefill ratio", 1.0),
    Limit(("cpu-memory",), None, "ProxyV-L8", "training ratio", 0.75),
    Limit(("cpu-memory",), None, "ProxyV-L6", "training ratio", 0.75),
    Limit(("cpu-large",), "prefill", "ProxyV-L8", "time ratio", 0.60, LARGE),
    Limit(("cpu-large",), "prefill", "ProxyV-L6", "time ratio", 0.48, LARGE),
    Limit(("cpu-large",), None, None, "process_peak_mib", 12e9 / (1 << 20)),
    Limit(("gpu-vicuna-7b-sdpa-b1",), "prefill", "ProxyV-L12", "time ratio", 0.60),
    Limit(("gpu-vicuna-7b-sdpa-b1",), "prefill", "ProxyV-L16", "time ratio", 0.69),
    Limit(("gpu-vicuna-7b-eager-b1",), "prefill", "ProxyV-L12", "time ratio", 0.63),
    Limit(("gpu-vicuna-7b-eager-b1",), "prefill", "ProxyV-L16", "time ratio", 0.73),
)
POINTS, SAVED_AT_LEAST = 4.0, 20.0
"""Points of FLOPs saved that may be missing from the time saved on a CPU, where so many are."""
HOLDS = "holds"


def limits_report(folder: Path) -> Report:
    """Every limit beside what the reports of a folder say.

    Args:
        folder: holds their JSON files.

    Raises:
        ValueError: none of the reports is there.
    """
    reports = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    reports = {name: found for name, found in reports.items() if "plot" in found}
    named = dict.fromkeys(name for limit in LIMITS for name in limit.reports)
    if not set(named) & set(reports):
        raise ValueError(
            f"{folder} has none of the reports {', '.join(sorted(named))}: "
            "run bash scripts/benchmark.sh first"
        )
    rows = [
        _line(limit, name, reports[name])
        for limit in LIMITS
        for name in limit.reports
        if name in reports
    ]
    saved = [line for name, found in reports.items() for line in _saved_lines(name, found)]
    short = [line for line in saved if line["verdict"] != HOLDS]
    missing = sorted(set(named) - set(reports))
    drawn = [line for line in (*rows, *short) if str(line["column"]).endswith("ratio")]
    drawn = [line for line in drawn if line["measured"] is not None]
    return Report(
        name="limits",
        title="Measured, against what it should be",
        rows=[*rows, *short],
        notes="Ratios to the stock model of the same process. Where a CPU saves more than "
        f"{SAVED_AT_LEAST:.0f} % of the FLOPs as run, it should save as much of the time, but for "
        f"{POINTS:.0f} points: so it is in {len(saved) - len(short)} of {len(saved)} rows of all "
        "reports; the others stand here with that limit. Spread: of the arm's own rounds; with a "
        "large one the machine was busy."
        + (f" Not measured: {', '.join(missing)}." if missing else ""),
        plot=Plot(
            x=[f"{line['report']} {line['operation']} {_short(line)}" for line in drawn],
            series={name: [line[name] for line in drawn] for name in ("measured", "limit")},
            y_label="ratio to the stock model",
        ),
    )


def _short(line: dict[str, Any]) -> str:
    """Arm and kind of ratio, such as "L8 training"."""
    kind = line["column"].removesuffix(" ratio")
    return line["arm"].removeprefix("ProxyV-") + ("" if kind == "time" else f" {kind}")


def _line(limit: Limit, name: str, found: dict[str, Any]) -> dict[str, Any]:
    """One limit in one report; one that lacks the row (other start layers, say) says so."""
    rows = [found] if limit.arm is None else found["rows"]
    if limit.arm is not None:
        asked = {"arm": limit.arm, "operation": limit.operation, **limit.shape}
        rows = [row for row in rows if all(row.get(k, v) == v for k, v in asked.items())]
    value = next((row[limit.column] for row in rows if limit.column in row), None)
    return {
        "report": name,
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
    """Time beside FLOPs, for the timed rows of a CPU's report that save many of them."""
    if report["settings"].get("device") != "cpu":
        return
    for row in report["rows"]:
        saved = row.get("FLOPs saved %", 0.0)
        if saved <= SAVED_AT_LEAST or "time ratio" not in row:
            continue
        where = [f"{row[key]} {key}" for key in ("crops", "text") if key in row]
        limit = 1 - (saved - POINTS) / 100
        yield {
            "report": name,
            "operation": ", ".join([row["operation"], *where]),
            "arm": row["arm"],
            "column": "time ratio",
            "measured": row["time ratio"],
            "limit": limit,
            "spread %": _spread(row),
            "verdict": _verdict(row["time ratio"] <= limit),
            "made": _made(report),
        }


def _made(report: dict[str, Any]) -> str:
    """Day, commit and device of a report; not those of the table that collects it."""
    device = report.get("hardware", {}).get("device", "")
    commit = short_commit(report.get("commit"))
    return f"{report.get('date', '')[:10]} {commit} {device}".strip()


def _spread(row: dict[str, Any]) -> float | None:
    """How far the rounds lie apart, in percent of their median; None where nothing was timed."""
    return 100 * row["spread ms"] / row["median ms"] if "spread ms" in row else None


def _verdict(holds: bool) -> str:
    return HOLDS if holds else "DOES NOT HOLD"
