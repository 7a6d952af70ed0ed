"""Questions a second: one by one, in batches, and with what questions about a page share read once.

    python scripts/benchmark_evaluation.py --model runs/quickstart/finetune

Documents of the small world are asked about in the way of `python -m proxyv.eval`, at one crop and
at five. The ways take turns, and the fastest round of each counts. On a machine with other work use
OMP_NUM_THREADS=1: times are then CPU seconds of the process, which that work changes least.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image

from proxyv.cli import run_command
from proxyv.eval.answerer import Answerer
from proxyv.eval.benchmarks import BENCHMARKS, Sample
from proxyv.eval.plan import Item, make_batches
from proxyv.synthetic.world import Mix, draw_page

SUFFIX = "\nAnswer the question using a single word or phrase."


class Way(NamedTuple):
    """How questions are asked."""

    name: str
    batch_size: int
    shares: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print one line for each number of crops and each way."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--pages", type=int, default=16, help="default 16")
    parser.add_argument("--questions", type=int, default=4, help="of a page, at most (default 4)")
    parser.add_argument("--batch-size", type=int, default=16, help="default 16")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--dtype", help="as for python -m proxyv.eval")
    args = parser.parse_args(argv)
    answerer = Answerer.load(args.model, dtype=args.dtype)
    crop_px = answerer.processor.crop_px
    ways = [
        Way("one by one", 1, False),
        Way(f"batches of up to {args.batch_size}", args.batch_size, False),
        Way("those, pages read once", args.batch_size, True),
    ]
    for crops, side_px, ratio in ((1, crop_px, "pad"), (5, 2 * crop_px, "anyres")):
        answerer.processor.image_aspect_ratio = ratio
        answerer.processor.image_processor.image_grid_pinpoints = [[2 * crop_px, 2 * crop_px]]
        pages = [
            draw_page((7, index), "test", Mix(documents=1, charts=0), (side_px, side_px))
            for index in range(args.pages)
        ]
        work = [
            (question.text + SUFFIX, page.image)
            for page in pages
            for question in page.questions[: args.questions]
        ]
        seconds: dict[Way, list[float]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, found in seconds.items():
                found.append(_time(answerer, work, way))
        slowest = min(seconds[ways[0]])
        for way, found in seconds.items():
            print(
                f"{crops} crop{'s' * (crops > 1)}, {way.name}: {len(work) / min(found):.2f} "
                f"questions/s, {slowest / min(found):.2f} times as many as one by one "
                f"({len(work)} questions, {len(pages)} pages, {torch.get_num_threads()} threads, "
                f"{answerer.describe()['dtype']})",
                flush=True,
            )
    return 0


def _time(answerer: Answerer, work: Sequence[tuple[str, Image.Image]], way: Way) -> float:
    """Seconds for all questions."""
    longest = BENCHMARKS["docvqa"].max_new_tokens
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    items = []
    for index, (question, image) in enumerate(work):
        sizes_hw = ((image.height, image.width),)
        sample = Sample(str(index), question, question, ())
        length, page = answerer.length(question, sizes_hw), str(id(image))
        shared = answerer.shared_length(sizes_hw) if way.shares else 0
        items.append(Item(index, sample, index, sizes_hw, False, length, page, shared))
    batches = make_batches(items, way.batch_size, answerer.batch_tokens)
    started = clock()
    for batch in batches:
        shown = [work[item.index][1] for item in batch]
        images = [[image if way.shares else image.copy()] for image in shown]
        prompts = answerer.prepare([item.sample.prompt for item in batch], images)
        answerer.generate(prompts, longest)
    return clock() - started


if __name__ == "__main__":
    sys.exit(run_command(main))
