"""Questions a second, batched against one by one, at one crop and at five.

    python scripts/benchmark_evaluation.py --model runs/quickstart/finetune

Documents of the small world are asked about in the way of `python -m proxyv.eval`. Both ways take
turns, and the fastest round of each counts. On a machine with other work use OMP_NUM_THREADS=1:
times are then CPU seconds of the process, which that work changes least.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from PIL import Image

from proxyv.cli import run_command
from proxyv.eval.answerer import Answerer
from proxyv.eval.benchmarks import BENCHMARKS
from proxyv.synthetic.world import Mix, draw_page


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print one line for each number of crops."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--questions", type=int, default=32, help="default 32")
    parser.add_argument("--batch-size", type=int, default=16, help="default 16")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--dtype", help="as for python -m proxyv.eval")
    args = parser.parse_args(argv)
    answerer = Answerer.load(args.model, dtype=args.dtype)
    crop_px = answerer.processor.crop_px
    for crops, side_px, ratio in ((1, crop_px, "pad"), (5, 2 * crop_px, "anyres")):
        answerer.processor.image_aspect_ratio = ratio
        answerer.processor.image_processor.image_grid_pinpoints = [[2 * crop_px, 2 * crop_px]]
        pages = [
            draw_page((7, index), "test", Mix(documents=1, charts=0), (side_px, side_px))
            for index in range(args.questions)
        ]
        suffix = "\nAnswer the question using a single word or phrase."
        work = [(page.questions[0].text + suffix, page.image) for page in pages]
        work.sort(key=lambda pair: -len(pair[0]))
        seconds: dict[int, list[float]] = {1: [], args.batch_size: []}
        for _ in range(args.rounds):
            for size, found in seconds.items():
                found.append(_time(answerer, work, size))
        one, many = (len(work) / min(found) for found in seconds.values())
        print(
            f"{crops} crop{'s' * (crops > 1)}: {one:.2f} questions/s one by one, {many:.2f} in "
            f"batches of up to {args.batch_size}: {many / one:.2f} times as many "
            f"({torch.get_num_threads()} threads, {answerer.describe()['dtype']})",
            flush=True,
        )
    return 0


def _time(answerer: Answerer, work: Sequence[tuple[str, Image.Image]], size: int) -> float:
    """Seconds for all questions, so many at a time."""
    longest = BENCHMARKS["docvqa"].max_new_tokens
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    longest_input = answerer.length(work[0][0], [(work[0][1].height, work[0][1].width)])
    if answerer.batch_tokens is not None:
        size = max(1, min(size, answerer.batch_tokens // longest_input))
    started = clock()
    for start in range(0, len(work), size):
        questions, images = zip(*work[start : start + size], strict=True)
        answerer.generate(answerer.prepare(questions, [[image] for image in images]), longest)
    return clock() - started


if __name__ == "__main__":
    sys.exit(run_command(main))
