"""A small world for the study's commands: questions in DocVQA's schema, runs, and examples."""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from proxyv.eval.__main__ import main as evaluate
from proxyv.eval.records import read_records, rewrite_records
from proxyv.study.__main__ import build_parser

SIZES = [(30 + 20 * (index % 3), 40) for index in range(6)]


def random_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A picture of this width and height."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_docvqa(
    folder: Path,
    sizes: Sequence[tuple[int, int]],
    questions: Sequence[str] | None = None,
    answers: Sequence[str] | None = None,
) -> None:
    """Write a question with its answer about a picture of each width and height."""
    rows = []
    for index, size in enumerate(sizes):
        stream = io.BytesIO()
        random_picture(index, size).save(stream, "PNG")
        rows.append(
            {
                "questionId": str(index),
                "question": questions[index] if questions else "What?",
                "image": {"bytes": stream.getvalue(), "path": None},
                "docId": index,
                "answers": [answers[index] if answers else f"answer {index}"],
            }
        )
    (folder / "docvqa").mkdir(parents=True, exist_ok=True)
    table = Dataset.from_list(rows).cast_column("image", ImageFeature())
    table.to_parquet(str(folder / "docvqa/validation.parquet"))


def evaluate_small(model: Path, data: Path, output: Path, *more: str) -> int:
    """Ask a model the questions; the command's exit code."""
    given = {"model": model, "data": data, "output": output, "tasks": "docvqa", "device": "cpu"}
    options = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    return evaluate([*options, *more])


def answer_rightly(folder: Path, right: int) -> None:
    """Give the first questions of a run right answers, the others wrong ones."""
    path = folder / "docvqa.jsonl"
    records = read_records(path)
    for record in records:
        good = record["index"] < right
        record["answer"] = record["references"][0] if good else "no"
    rewrite_records(path, records)
    assert evaluate(["rescore", str(folder)]) == 0


def example(command: str) -> list[str]:
    """The words of a command's example in ``--help``, as it stands there."""
    lines = str(build_parser().epilog).replace("\\\n", " ").splitlines()
    found = [words for line in lines if (words := shlex.split(line))[3:4] == [command]]
    assert len(found) == 1 and found[0][:3] == ["python", "-m", "proxyv.study"]
    return found[0][3:]
