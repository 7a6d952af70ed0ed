"""Write the small world to disk in the schemas of the real data sets.

    python -m proxyv.synthetic --out data/generated

gives ShareGPT4V captions (stage 1), LLaVA-NeXT conversations (stage 2), and DocVQA and ChartQA
rows for evaluation; ``--all-benchmarks`` adds rows of every other benchmark. Both training sets
name their pictures relative to ``--out``. Everything follows from the seed; the training half and
the test half share no page, no seed, no typeface, no layout and no value of three characters or
more (labels, axis ticks and the measures and years in chart titles are common to both).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from proxyv.synthetic.charts import make_chart
from proxyv.synthetic.degrade import degrade
from proxyv.synthetic.documents import make_document, make_text_page
from proxyv.synthetic.page import Page, Split
from proxyv.synthetic.scene_tables import write_scene_sets
from proxyv.synthetic.tables import (
    png_bytes,
    write_ccpdf,
    write_chartqa,
    write_docvqa,
    write_docvqa_test,
    write_infovqa,
)
from proxyv.synthetic.word_grid import make_word_grid

__all__ = ["CHART_PROMPT", "DOCUMENT_PROMPT", "READ_PROMPT", "Mix", "draw_page", "write_world"]

DOCUMENT_PROMPT = "\nAnswer the question using a single word or phrase."
CHART_PROMPT = "\nAnswer the question with a single word."
READ_PROMPT = "Read the page."

KINDS = ("text", "documents", "charts", "small_charts", "grids")
WRITTEN = {"text": make_text_page, "documents": make_document, "grids": make_word_grid}

_TRAIN_STREAM, _TEST_STREAM, _FURTHER_STREAM, _SCENE_STREAM = 0, 1, 2, 3


@dataclass(frozen=True)
class Mix:
    """Shares of page kinds, normalised to one; and how many questions are asked of a chart."""

    text: float = 0.0
    documents: float = 0.5
    charts: float = 0.5
    small_charts: float = 0.0
    grids: float = 0.0
    chart_questions: tuple[int, int] = (3, 6)


def draw_page(
    seed: tuple[int, ...], split: Split, mix: Mix, size_hw: tuple[int, int] = (168, 168)
) -> Page:
    """The page of a seed, worn as by a scanner; the same seed always gives the same page."""
    rng = np.random.default_rng(seed)
    shares = np.array([mix.text, mix.documents, mix.charts, mix.small_charts, mix.grids])
    kind = KINDS[int(rng.choice(len(KINDS), p=shares / shares.sum()))]
    if kind in WRITTEN:
        page = WRITTEN[kind](rng, split, size_hw)
    else:
        page = make_chart(rng, split, size_hw, mix.chart_questions, small=kind == "small_charts")
    return degrade(page, rng)


def is_chart(page: Page) -> bool:
    """Whether a page is a chart (else a document)."""
    return page.template.partition("/")[0] in ("bar", "hbar", "grouped", "line", "pie")


def prompt_suffix(page: Page) -> str:
    """The instruction that the benchmark of this kind of page puts behind its questions."""
    return CHART_PROMPT if is_chart(page) else DOCUMENT_PROMPT


def _draw(seed: tuple[int, ...], split: Split, mix: Mix, side_px: int) -> tuple[Page, bytes]:
    page = draw_page(seed, split, mix, (side_px, side_px))
    return page, png_bytes(page.image)


def _pages(
    seed: int, stream: int, count: int, split: Split, mix: Mix, side_px: int, workers: int
) -> Iterator[tuple[Page, bytes]]:
    """Pages in the order of their seeds, drawn by several processes."""
    seeds = [(seed, stream, int(mix.charts > 0), index) for index in range(count)]
    bar = tqdm(total=count, desc=f"{split} {'charts' if mix.charts else 'documents'}", unit="page")
    with ProcessPoolExecutor(workers) as pool, bar:
        for result in pool.map(
            _draw, seeds, repeat(split), repeat(mix), repeat(side_px), chunksize=32
        ):
            bar.update()
            yield result


def write_world(
    out: Path,
    *,
    seed: int = 2026,
    train_documents: int = 3000,
    train_charts: int = 3000,
    test_documents: int = 100,
    test_charts: int = 100,
    questions_per_page: int = 5,
    side_px: int = 168,
    workers: int | None = None,
    all_benchmarks: bool = False,
) -> dict[str, int]:
    """Write both training sets, DocVQA and ChartQA under ``out``.

    Args:
        out: folder; files of an earlier run are replaced.
        seed: where all randomness comes from.
        train_documents: document pages for training.
        train_charts: chart pages for training.
        test_documents: document pages for evaluation.
        test_charts: chart pages for evaluation.
        questions_per_page: questions taken from a page at most, in training and evaluation.
        side_px: page side in pixels.
        workers: processes that draw (default: one for each core).
        all_benchmarks: whether every other benchmark is written too, each from as many new
            pictures as there are test documents; the other files are the same either way.

    Returns:
        Rows written for each data set.

    Raises:
        ValueError: a count is negative, or ``side_px`` is too small to write on.
    """
    counts = {
        "train_documents": train_documents,
        "train_charts": train_charts,
        "test_documents": test_documents,
        "test_charts": test_charts,
    }
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name} {count} is negative; give 0 or more pages")
    if side_px < 112:
        raise ValueError(f"side_px {side_px} is too small to write on; give 112 or more")
    workers = workers or os.cpu_count() or 1
    rows: dict[str, int] = {}
    only_documents, only_charts = Mix(documents=1, charts=0), Mix(documents=0, charts=1)
    captions: list[dict] = []
    conversations: list[dict] = []
    for folder in ("images", "sharegpt4v", "llava_next"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for kind, mix, count in (
        ("document", only_documents, train_documents),
        ("chart", only_charts, train_charts),
    ):
        stream = _pages(seed, _TRAIN_STREAM, count, "train", mix, side_px, workers)
        for index, (page, png) in enumerate(stream):
            name = f"{kind}_{index:06d}"
            rng = np.random.default_rng((seed, _TRAIN_STREAM, index))
            (out / "images" / f"{name}.png").write_bytes(png)
            captions.append(_caption_row(name, page))
            conversations.append(_conversation_row(name, page, kind, questions_per_page, rng))
    _write_json(out / "sharegpt4v" / "captions.json", captions)
    _write_json(out / "llava_next" / "conversations.json", conversations)
    rows |= {"sharegpt4v": len(captions), "llava_next": len(conversations)}
    documents = _pages(seed, _TEST_STREAM, test_documents, "test", only_documents, side_px, workers)
    rows["docvqa"] = write_docvqa(out / "docvqa", documents, questions_per_page)
    charts = _pages(seed, _TEST_STREAM, test_charts, "test", only_charts, side_px, workers)
    rows["chartqa"] = write_chartqa(out / "chartqa", charts, questions_per_page)
    if all_benchmarks:
        draw = partial(_pages, seed, _FURTHER_STREAM, test_documents, "test")
        documents = draw(only_documents, side_px, workers)
        charts = draw(only_charts, side_px, workers)
        rows |= _write_further(out, seed, list(documents), charts, questions_per_page, side_px)
    return rows


def _write_further(
    out: Path,
    seed: int,
    documents: Sequence[tuple[Page, bytes]],
    charts: Iterator[tuple[Page, bytes]],
    most: int,
    side_px: int,
) -> dict[str, int]:
    """Write the benchmarks besides DocVQA and ChartQA, and DocVQA's test split."""
    seeds = [(seed, _SCENE_STREAM, index) for index in range(len(documents))]
    return {
        "docvqa (test)": write_docvqa_test(out / "docvqa", documents),
        "infovqa": write_infovqa(out / "infovqa", documents, charts, most),
        "ccpdf": write_ccpdf(out / "ccpdf", documents),
        **write_scene_sets(out, seeds, documents, side_px),
    }


def _caption_row(name: str, page: Page) -> dict:
    """A row in ShareGPT4V's schema: the caption is what is written or drawn."""
    return {
        "id": name,
        "image": f"images/{name}.png",
        "conversations": [
            {"from": "human", "value": f"<image>\n{READ_PROMPT}"},
            {"from": "gpt", "value": page.caption},
        ],
    }


def _conversation_row(
    name: str, page: Page, source: str, most: int, rng: np.random.Generator
) -> dict:
    """A row in LLaVA-NeXT-Data's schema: several questions about one page."""
    turns = []
    for place, index in enumerate(rng.permutation(len(page.questions))[:most]):
        question = page.questions[int(index)]
        opening = "<image>\n" if place == 0 else ""
        asked = f"{opening}{question.text}{prompt_suffix(page)}"
        turns.append({"from": "human", "value": asked})
        turns.append({"from": "gpt", "value": question.answers[0]})
    return {
        "id": name,
        "image": f"images/{name}.png",
        "conversations": turns,
        "data_source": f"small_world_{source}",
    }


def _write_json(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
