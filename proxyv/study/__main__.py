"""Studies of trained models: ``python -m proxyv.study COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from proxyv.cli import run_command
from proxyv.study import comparison, gallery, redundancy, table

__all__ = ["main"]

_EXAMPLES = """examples:
  python -m proxyv.study redundancy --model runs/tiny-baseline/finetune --data data/generated \\
      --tasks docvqa --ratios 0,0.5,1
  python -m proxyv.study table runs/eval/baseline runs/eval/atn runs/eval/atn_ffn
  python -m proxyv.study gallery runs/eval/fastv runs/eval/proxyv
  python -m proxyv.study compare base=runs/tiny-baseline/finetune \\
      fastv=runs/tiny-baseline/finetune@method=fastv,layer=2,ratio=0.5 \\
      proxyv=runs/tiny/finetune --data data/generated --tasks docvqa

runs/eval/NAME: a result folder of python -m proxyv.eval --output runs/eval/NAME"""

_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[..., int]]] = {
    "redundancy": (
        "score of a model whose vision tokens do not see each other in its last layers",
        redundancy.add_options,
        redundancy.run,
    ),
    "table": (
        "what is lost and saved by skipping attention, or attention and FFN, from finished runs",
        table.add_options,
        table.run,
    ),
    "gallery": (
        "questions that a reduced model gets wrong and another one does not, with what it kept",
        gallery.add_options,
        gallery.run,
    ),
    "compare": (
        "score, FLOPs, time and memory of models and of token-reduction methods in one table",
        comparison.add_options,
        comparison.run,
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    kind = argparse.RawDescriptionHelpFormatter
    look: dict[str, Any] = {"formatter_class": kind, "epilog": _EXAMPLES}
    parser = argparse.ArgumentParser(
        prog="python -m proxyv.study", description="Studies of trained models.", **look
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (text, add_options, _) in _COMMANDS.items():
        add_options(commands.add_parser(name, help=text, description=text, **look))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    return _COMMANDS[args.command][2](args)


if __name__ == "__main__":
    sys.exit(run_command(main))
