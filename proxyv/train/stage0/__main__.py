"""Train the parts of the tiny preset: ``python -m proxyv.train.stage0 PART --run FOLDER``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from proxyv.cli import run_command
from proxyv.train.stage0.language import LanguageSettings, train_language
from proxyv.train.stage0.pair import PairSettings, train_pair
from proxyv.train.stage0.projector import ProjectorSettings, train_projector
from proxyv.train.stage0.tower import TowerSettings, train_tower


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and train one part."""
    parser = argparse.ArgumentParser(
        prog="python -m proxyv.train.stage0",
        description="Train the language model, then the vision tower of the tiny preset from "
        "scratch on the small world, then fit the projector between them, then train all three "
        "together. A run that was stopped goes on where it was.",
        epilog="examples:\n"
        "  python -m proxyv.train.stage0 tower --run runs/tower --steps 9000\n"
        "  python -m proxyv.train.stage0 tower --run runs/tower --device cuda --batch 256 "
        "--workers 14\n"
        "  python -m proxyv.train.stage0 pair --run runs/pair --steps 4000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=("language", "tower", "projector", "pair"))
    parser.add_argument("--run", type=Path, required=True, help="folder for state and log")
    parser.add_argument("--out", type=Path, help="default: its place in data/tiny")
    parser.add_argument(
        "--init", type=Path, help="folder to start from: an earlier backbone, or data/tiny"
    )
    parser.add_argument("--steps", type=int, help="default 8000, 9000, 420, 4000")
    parser.add_argument("--seed", type=int, help="default 12, 11, 29, 51")
    parser.add_argument("--batch", type=int, help="pages of a step, default 12, 32, 32, 12")
    parser.add_argument("--device", help="cpu (default) or cuda; not of the projector")
    parser.add_argument("--workers", type=int, help="processes that draw pages, default 1")
    parser.add_argument("--threads", type=int, help="torch threads, default all")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    passed = ("steps", "seed", "init", "batch", "device", "workers")
    given = {k: v for k, v in vars(options).items() if k in passed and v is not None}
    tiny = Path("data/tiny")
    if options.part == "projector":
        if options.init or options.device:
            raise ValueError(
                "--init and --device: the projector is fitted anew, in minutes, on the CPU; leave "
                "them out"
            )
        out = options.out or tiny / "projector.safetensors"
        train_projector(ProjectorSettings(run=options.run, out=out, **given))
    elif options.part == "pair":
        out = options.out or tiny
        train_pair(PairSettings(run=options.run, out=out, **given))
    elif options.part == "tower":
        out = options.out or tiny / "vision"
        train_tower(TowerSettings(run=options.run, out=out, **given))
    else:
        out = options.out or tiny / "language"
        train_language(LanguageSettings(run=options.run, out=out, **given))
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
