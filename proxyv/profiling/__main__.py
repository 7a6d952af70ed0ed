"""What a model costs: ``python -m proxyv.profiling COMMAND``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from proxyv.cli import nearest, run_command
from proxyv.config import PROXY_KINDS, SKIPS, ProxyVConfig
from proxyv.model.flops import RowTokens
from proxyv.profiling.arms import build_arms
from proxyv.profiling.commands import (
    OPERATIONS,
    Rounds,
    breakdown_report,
    latency_report,
    memory_report,
    scaling_report,
)
from proxyv.profiling.costs import flops_report
from proxyv.profiling.levers import levers_report
from proxyv.profiling.limits import limits_report
from proxyv.profiling.loss import loss_report
from proxyv.profiling.paper import PAPER
from proxyv.profiling.report import Report
from proxyv.profiling.shapes import from_preset, from_shape, start_layers, with_start
from proxyv.reduction.options import HELP, parse_options

__all__ = ["main"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2")
_EXAMPLES = """examples:
  python -m proxyv.profiling flops
  python -m proxyv.profiling latency --shape layers=4,width=256,heads=4,ffn=512 --start-layers 2
  python -m proxyv.profiling scaling --preset vicuna-7b --device cuda --output runs/profiling
  python -m proxyv.profiling limits docs/results"""


def build_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m proxyv.profiling",
        description="FLOPs, time and memory of the baseline and of ProxyV side by side, on random "
        "weights: nothing is downloaded.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "flops": "analytic FLOPs of a prefill, beside the paper's figures",
        "latency": "prefill, decoding step, whole answer and training step",
        "memory": "peak above the weights, and the cache",
        "scaling": "prefill by number of crops and text tokens",
        "breakdown": "share of time of each part of a layer",
        "levers": "a prefill without each of the ways in which time is saved",
        "loss": "the loss of a training step, by all logits and by those of supervised rows",
        "limits": "what was measured, against what it should be",
    }
    for name, text in helps.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == "limits":
            command.add_argument("results", type=Path, help="folder with the JSON files")
        else:
            _add_options(command, name)
        command.add_argument("--output", type=Path, help="folder for table, JSON file and plot")
        command.add_argument("--name", help="of these files (default: the command's)")
        command.add_argument("--json", action="store_true", help="print JSON, not the table")
    return parser


def _add_options(parser: argparse.ArgumentParser, command: str) -> None:
    add = parser.add_argument
    many = " (default: the paper's six)" if command == "flops" else ""
    add("--preset", help=f"folder under configs/, or several with commas{many}")
    add(
        "--shape",
        help="layers=16,width=1024,heads=16,ffn=2752[,key_heads=,vocab=,family=,side=,reduction=]",
    )
    add(
        "--start-layers",
        help="with commas (default: the paper's or the preset's; of a shape the middle)",
    )
    add("--proxy-kind", choices=PROXY_KINDS, help="default: the preset's")
    add("--skip", help=f"also models whose vision tokens skip: {', '.join(SKIPS)}, or both")
    if command == "scaling":
        add("--crops", default="1,2,5,10,20,40", help="default: 1,2,5,10,20,40")
        add("--text-lengths", default="50", help="with commas (default: 50)")
    else:
        add("--crops", type=int, default=5, help="default: 5")
        add("--text", type=int, default=50, help="text tokens (default: 50)")
    add("--attn", choices=_ATTENTION, default="sdpa", help="of all arms (default: sdpa)")
    if command not in ("breakdown", "levers", "loss"):
        add("--reduction", action="append", default=[], help=f"also models with {HELP}; repeatable")
        add("--kept", type=int, help="tokens of a crop that prumerge leaves")
    if command == "flops":
        return
    add("--batch", type=int, default=1, help="rows (default: 1)")
    add("--dtype", choices=_DTYPES, help="default: bfloat16 on a GPU, else float32")
    add("--device", help="cpu, cuda, cuda:1 (default: the first GPU, if any)")
    add("--seed", type=int, default=0, help="of the weights (default: 0)")
    if command != "memory":
        add("--repeats", type=int, default=5, help="measured rounds (default: 5)")
    if command in ("latency", "scaling"):
        add("--warmup", type=int, default=1, help="rounds before them (default: 1)")
        add("--compile", action="store_true", help="torch.compile every layer, of all arms alike")
    if command in ("latency", "memory"):
        known = OPERATIONS if command == "latency" else ("prefill", "training")
        add("--operations", default=",".join(known), help="with commas (default: %(default)s)")
        add("--checkpointing", action="store_true", help="train with gradient checkpointing")
    if command == "latency":
        add("--tokens", type=int, default=16, help="of the whole answer (default: 16)")
    if command == "scaling":
        add("--no-memory", action="store_true", help="leave the peak memory out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    for name in ("crops", "text", "batch", "repeats", "tokens", "warmup", "kept"):
        least = 0 if name in ("crops", "warmup") else 1
        value = getattr(args, name, None)
        if isinstance(value, int) and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if args.command == "limits":
        report = limits_report(args.results)
    else:
        report = _flops(args) if args.command == "flops" else _measure(args)
    report = dataclasses.replace(report, name=args.name or report.name)
    report.settings.update(
        {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()
            if name != "output"  # says nothing of the numbers
        }
    )
    if args.output is not None:
        report.save(args.output)
    report.print(args.json)
    return 0


def _models(args: argparse.Namespace) -> list[tuple[str, ProxyVConfig, Sequence[int]]]:
    """Name, configuration and start layers of what was asked for."""
    if args.preset is not None and args.shape is not None:
        raise ValueError("give --preset or --shape, not both")
    if args.shape is not None:
        config = from_shape(args.shape)
        return [("shape", config, start_layers(args.start_layers, None, config))]
    presets = list(PAPER) if args.preset is None else args.preset.split(",")
    configs = {preset: from_preset(preset) for preset in presets}
    return [(p, c, start_layers(args.start_layers, p, c)) for p, c in configs.items()]


def _flops(args: argparse.Namespace) -> Report:
    row = RowTokens(args.crops, args.text, kept=args.kept)
    options = _options(args)
    return flops_report(
        _models(args), row, args.attn != "eager", options, _skips(args.skip), _methods(args)
    )


def _measure(args: argparse.Namespace) -> Report:
    if args.preset is None and args.shape is None:
        raise ValueError(f"{args.command} needs --preset, such as vicuna-7b, or --shape")
    models = _models(args)
    if len(models) > 1:
        raise ValueError(f"{args.command} measures one preset at a time, got {args.preset!r}")
    _, config, starts = models[0]
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype is None:
        args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    config = with_start(config, None, **_options(args))
    if args.command == "loss":
        torch.manual_seed(args.seed)
        row, device = RowTokens(args.crops, args.text), torch.device(args.device)
        return loss_report(config, row, args.batch, args.repeats, _DTYPES[args.dtype], device)
    operations = _operations(args) if args.command in ("latency", "memory") else []
    torch.manual_seed(args.seed)
    dtype, skips = _DTYPES[args.dtype], _skips(args.skip)
    methods = [] if args.command in ("breakdown", "levers") else _methods(args)
    arms = build_arms(config, list(starts), args.attn, dtype, args.device, skips, methods)
    if getattr(args, "compile", False):
        for arm in arms:
            arm.compile()
    if args.command == "scaling":
        crops, texts = (_numbers(args, name) for name in ("crops", "text_lengths"))
        rounds = Rounds(args.repeats, args.warmup)
        row = RowTokens(0, 0, kept=args.kept)
        rows = [dataclasses.replace(row, crops=c, text=t) for t in texts for c in crops]
        return scaling_report(arms, rows, args.batch, rounds, not args.no_memory)
    row = RowTokens(args.crops, args.text, kept=getattr(args, "kept", None))
    if args.command == "breakdown":
        return breakdown_report(arms, row, args.batch, args.repeats)
    if args.command == "levers":
        return levers_report(arms, row, args.batch, args.repeats)
    if args.command == "memory":
        return memory_report(arms, row, args.batch, operations, args.checkpointing)
    rounds = Rounds(args.repeats, args.warmup)
    return latency_report(
        arms, row, args.batch, rounds, operations, args.tokens, args.checkpointing
    )


def _operations(args: argparse.Namespace) -> list[str]:
    known = OPERATIONS if args.command == "latency" else ("prefill", "training")
    chosen = [name.strip() for name in args.operations.split(",")]
    for name in chosen:
        if name not in known:
            raise ValueError(nearest("operation", name, known))
    return chosen


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {} if args.proxy_kind is None else {"proxy_kind": args.proxy_kind}


def _methods(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Token-reduction methods of further arms."""
    return [method for text in args.reduction if (method := parse_options(text)) is not None]


def _skips(given: str | None) -> list[str]:
    names = [] if given is None else [name.strip() for name in given.split(",")]
    for name in names:
        if name not in SKIPS:
            raise ValueError(nearest("value of --skip", name, SKIPS))
    return names


def _numbers(args: argparse.Namespace, name: str) -> list[int]:
    parts = getattr(args, name).split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)!r}: write 1,2,5")
    return [int(part) for part in parts]


if __name__ == "__main__":
    sys.exit(run_command(main))
