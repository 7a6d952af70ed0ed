"""Write the small world: ``python -m proxyv.synthetic --out data/generated``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets import disable_progress_bars

from proxyv.cli import run_command
from proxyv.synthetic.world import HELD_OUT_KINDS, write_world


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and write the data sets."""
    parser = argparse.ArgumentParser(
        prog="python -m proxyv.synthetic",
        description="Render documents and charts with questions, in the schemas of ShareGPT4V, "
        "LLaVA-NeXT-Data, DocVQA and ChartQA.",
        epilog="example: python -m proxyv.synthetic --out data/generated --train-charts 2000",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=2026, help="default 2026")
    parser.add_argument("--train-documents", type=int, default=3000, help="pages, default 3000")
    parser.add_argument("--train-charts", type=int, default=3000, help="pages, default 3000")
    parser.add_argument(
        "--train-further",
        type=int,
        default=0,
        help="scenes, words, infographics and pages to be read, so many of each (default 0)",
    )
    parser.add_argument("--test-documents", type=int, default=100, help="pages, default 100")
    parser.add_argument("--test-charts", type=int, default=100, help="pages, default 100")
    parser.add_argument(
        "--questions-per-page", type=int, default=5, help="at most so many questions, default 5"
    )
    parser.add_argument("--side-px", type=int, default=168, help="page side, default 168")
    parser.add_argument(
        "--dense-px",
        type=int,
        default=None,
        help="side of infographics and of pages to be read (default: twice the page side)",
    )
    parser.add_argument("--workers", type=int, default=None, help="default: one for each core")
    parser.add_argument(
        "--all-benchmarks",
        action="store_true",
        help="also write the schemas of InfoVQA, TextVQA, OCRBench, MME, MMBench, SEED-Bench, GQA, "
        "RefCOCO and CCpdf, each from as many pictures as there are test documents",
    )
    parser.add_argument(
        "--familiar",
        nargs="+",
        choices=HELD_OUT_KINDS,
        default=(),
        help="test pages of these kinds in the typefaces, looks and layouts of training; only "
        "words and values are new",
    )
    parser.add_argument("--json", action="store_true", help="print the row counts as JSON")
    options = parser.parse_args(argv)
    disable_progress_bars()  # of `datasets`, for tables that take milliseconds
    rows = write_world(
        options.out,
        seed=options.seed,
        train_documents=options.train_documents,
        train_charts=options.train_charts,
        test_documents=options.test_documents,
        test_charts=options.test_charts,
        questions_per_page=options.questions_per_page,
        side_px=options.side_px,
        workers=options.workers,
        all_benchmarks=options.all_benchmarks,
        train_further=options.train_further,
        dense_px=options.dense_px,
        familiar=options.familiar,
    )
    if options.json:
        print(json.dumps(rows))
    else:
        for name, count in rows.items():
            print(f"{options.out / name}: {count} rows")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
