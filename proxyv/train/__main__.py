"""Train a stage.

    python -m proxyv.train --preset tiny --stage pretrain [section.name=value ...]
    python -m proxyv.train --config configs/tiny/finetune.yaml --dry-run

Starts ``--nproc`` ranks on this machine with torchrun's own launcher; started by torchrun
itself, it is one of the ranks. Several machines: start it on each, with NNODES, NODE_RANK and
MASTER_ADDR set, or by ``srun`` with one task a node, where SLURM sets what is needed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from proxyv.cli import run_command
from proxyv.train.config_files import describe_settings, load_settings, preset_file
from proxyv.train.nodes import find_nodes
from proxyv.train.settings import Settings


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m proxyv.train",
        description="Train a stage of a ProxyV model.",
        epilog="Settings, given as section.name=value:\n" + describe_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="YAML file")
    which.add_argument("--preset", help="folder under configs/, such as tiny or vicuna-7b")
    parser.add_argument(
        "--stage", choices=("pretrain", "finetune"), help="file of the preset (with --preset)"
    )
    parser.add_argument("--nproc", type=int, default=1, help="ranks on this machine (default 1)")
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would run, and build nothing"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.name=value")
    options = parser.parse_intermixed_args(argv)
    if options.preset is not None and options.stage is None:
        parser.error("--preset needs --stage")
    if options.config is not None and options.stage is not None:
        parser.error(
            f"--stage {options.stage} goes with --preset: a --config file says its own stage "
            "(stage.name)"
        )
    if options.nproc < 1:
        parser.error(f"--nproc {options.nproc}: at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see the module."""
    options = parse(argv)
    path = options.config or preset_file(options.preset, options.stage)
    settings = load_settings(path, options.overrides)
    if options.dry_run:
        from proxyv.train.dry_run import dry_run

        print(dry_run(settings, options.nproc * find_nodes(os.environ).count))
        return 0
    if "RANK" not in os.environ:
        from proxyv.train.launch import launch

        arguments = ["--config", str(path), *options.overrides]
        return launch(arguments, options.nproc, find_nodes(os.environ))
    return _work(settings)


def _work(settings: Settings) -> int:
    from proxyv.train.launch import die_with_parent, first_to_report, prepare_rank
    from proxyv.train.run import train
    from proxyv.train.signals import Interrupted

    die_with_parent()
    prepare_rank(settings)
    try:
        train(settings)
    except Interrupted as stopped:
        if first_to_report():
            print(stopped, flush=True)
        return 128 + stopped.number
    except (ValueError, OSError):
        if first_to_report():
            raise
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
