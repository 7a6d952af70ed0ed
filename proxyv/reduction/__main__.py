"""Preparing token reduction: ``python -m proxyv.reduction calibrate --model DIR ...``."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from proxyv.cli import CommandError, add_model_options, model_options, run_command
from proxyv.data.readers import Source
from proxyv.data.rows import Row
from proxyv.data.sources import open_source
from proxyv.data.templates import IMAGE_MARK
from proxyv.eval.answerer import Answerer, check_model_name
from proxyv.model.flops import layers_flops
from proxyv.model.reduced import prompt_rows
from proxyv.reduction.fitprune_calibration import AttentionSums, calibrate, read_sums, saved_share

__all__ = ["main"]

_EXAMPLE = """example:
  python -m proxyv.reduction calibrate --model runs/tiny-baseline/finetune --ratio 0.6 \\
      --annotations data/generated/llava_next/conversations.json --images data/generated \\
      --output fitprune.json
  python -m proxyv.eval --model runs/tiny-baseline/finetune --tasks docvqa \\
      --reduction "$(cat fitprune.json)\""""


def build_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    look: dict[str, Any] = {
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "epilog": _EXAMPLE,
    }
    parser = argparse.ArgumentParser(
        prog="python -m proxyv.reduction", description="Prepare token reduction.", **look
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "find how many image tokens FitPrune drops after which layer, on a few conversations"
    command = commands.add_parser("calibrate", help=text, description=text, **look)
    add = command.add_argument
    add("--model", required=True, help="model folder, or hub id; a baseline")
    add("--annotations", required=True, help="json, jsonl, parquet, a folder, a hub id, or yaml")
    add("--images", help="folder that image paths are relative to")
    add("--ratio", type=float, default=0.6, help="share of the prompt's FLOPs to save (0.6)")
    add("--samples", type=int, default=64, help="conversations with images to look at (64)")
    add("--seed", type=int, default=0, help="which ones they are (0)")
    add("--output", type=Path, default=Path("fitprune.json"), help="file (fitprune.json)")
    add_model_options(command)
    add("--json", action="store_true", help="print JSON instead of the summary")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    if args.samples < 1:
        raise CommandError(f"--samples {args.samples}: must be at least 1")
    if not 0 < args.ratio < 1:
        raise CommandError(f"--ratio {args.ratio}: must be between 0 and 1")
    check_model_name(args.model)
    source = open_source(args.annotations, args.images)
    answerer = Answerer.load(args.model, reduction=None, **model_options(args))
    config = answerer.model.config
    if config.start_layer is not None or config.packing != "crops":
        raise CommandError(
            f"--model {args.model}: start_layer={config.start_layer}, packing={config.packing!r}; "
            "FitPrune needs image tokens that are queries in all layers: calibrate a baseline "
            "(start_layer null) with packing 'crops'"
        )
    rows = list(_with_images(source, args.samples, args.seed))
    if len(rows) < args.samples:
        raise CommandError(
            f"--annotations {args.annotations}: {len(rows)} conversations ask about images in "
            f"their first message, --samples is {args.samples}: ask for fewer"
        )
    sums = [_look(answerer, row) for row in rows]

    def cost(lengths: Sequence[int]) -> float:
        return float(layers_flops(config, lengths))

    method = calibrate(sums, args.ratio, cost)
    found = json.loads(json.dumps(method.options()))
    saved = fmean(saved_share(method, one, cost) for one in sums)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found) + "\n", encoding="utf-8")
    summary = {"reduction": found, "samples": len(sums), "saved": saved, "file": str(args.output)}
    if args.json:
        print(json.dumps(summary))
        return 0
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"after each layer go: {', '.join(map(str, method.scheme))}")
    console.print(
        f"of {method.calibrated_tokens} image tokens {sum(method.scheme)} go; {saved:.1%} of the "
        f"decoder layers' FLOPs are saved on average over {len(sums)} prompts"
    )
    console.print(f'written: {args.output}; use it as --reduction "$(cat {args.output})"')
    return 0


def _with_images(source: Source, number: int, seed: int) -> Iterator[Row]:
    """At most so many rows, drawn by the seed, whose first message brings all their images."""
    found = 0
    for index in random.Random(seed).sample(range(len(source)), len(source)):
        row = source[index]
        marks = sum(message["content"].count(IMAGE_MARK) for message in _prompt(row))
        if marks and marks == len(row.images):
            found += 1
            yield row
        if found == number:
            return


def _prompt(row: Row) -> list[dict[str, str]]:
    """The messages up to the first answer."""
    roles = [turn.role for turn in row.turns]
    asked = row.turns[: roles.index("assistant")]
    return [{"role": turn.role, "content": turn.text} for turn in asked]


@torch.inference_mode()
def _look(answerer: Answerer, row: Row) -> AttentionSums:
    """What a model attends to where it reads the first question of a conversation."""
    model = answerer.model.model
    given = {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in answerer.inputs(
            [_prompt(row)], [[reference.load() for reference in row.images]]
        ).items()
    }
    embeds, layout, _ = model.embed(**given)
    rows = prompt_rows(layout, given["attention_mask"].bool(), None, None)
    return read_sums(model.language_model, embeds, rows)


if __name__ == "__main__":
    sys.exit(run_command(main))
