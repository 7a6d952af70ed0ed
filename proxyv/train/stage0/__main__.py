"""Train the tiny preset's backbones: ``python -m proxyv.train.stage0 tower|language``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from proxyv.cli import run_command
from proxyv.train.stage0.language import LanguageSettings, train_language
from proxyv.train.stage0.tower import TowerSettings, train_tower


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and train one backbone."""
    parser = argparse.ArgumentParser(
        prog="python -m proxyv.train.stage0",
        description="Train the vision tower or the language model of the tiny preset from scratch "
        "on the small world. A run that was stopped goes on where it was.",
        epilog="example: python -m proxyv.train.stage0 tower --run runs/tower --steps 9000",
    )
    parser.add_argument("backbone", choices=("tower", "language"))
    parser.add_argument("--run", type=Path, required=True, help="folder for state and log")
    parser.add_argument("--out", type=Path, help="default data/tiny/vision or data/tiny/language")
    parser.add_argument("--init", type=Path, help="folder of an earlier result to start from")
    parser.add_argument("--steps", type=int, help="default 9000 for the tower, 8000 for language")
    parser.add_argument("--seed", type=int, help="default 11 for the tower, 12 for language")
    parser.add_argument("--threads", type=int, help="torch threads, default all")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    given = {
        k: v for k, v in vars(options).items() if k in ("steps", "seed", "init") and v is not None
    }
    tiny = Path("data/tiny")
    if options.backbone == "tower":
        out = options.out or tiny / "vision"
        train_tower(TowerSettings(run=options.run, out=out, **given))
    else:
        out = options.out or tiny / "language"
        train_language(LanguageSettings(run=options.run, out=out, **given))
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
