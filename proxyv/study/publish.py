"""What the study's commands do with a report: its files, the console, and what it depends on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from proxyv.cli import message_console
from proxyv.eval.statistics import SEED
from proxyv.profiling.report import Report

__all__ = ["publish"]


def publish(report: Report, args: argparse.Namespace, folder: Path) -> None:
    """Write a report to a folder with the options that it was made with, and print it.

    Args:
        report: whose intervals come from ``proxyv.eval.statistics``.
        args: of the command; ``device`` names the one that was used, where there was any.
        folder: for ``NAME.json``, ``NAME.md`` and ``NAME.png``.
    """
    options = json.loads(json.dumps(vars(args), default=str))
    report.settings.update({"seed": SEED, **options})
    report.save(folder)
    report.print(args.json)
    console = message_console()
    console.print(f"written: {folder / report.name}.json, .md and .png")
