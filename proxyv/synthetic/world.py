"""Write the small world to disk in the schemas of the real data sets.

    python -m proxyv.synthetic --out data/generated

gives ShareGPT4V captions (stage 1), LLaVA-NeXT conversations (stage 2), and DocVQA and ChartQA
rows for evaluation. ``--all-benchmarks`` adds rows of every other benchmark, ``--train-further``
rows that train for them. Both training sets name their pictures relative to ``--out``. Everything
follows from the seed; the training half and the test half share no page, no seed, no typeface, no
layout and no value of three characters or more (labels, colours, places, coordinates, axis ticks
and the measures and years in chart titles are common to both). The kinds of pages named with
``--familiar`` look the same in both, and only words and values are new in the test half.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm.auto import tqdm

from proxyv.synthetic.chart_questions import KINDS as CHART_KINDS
from proxyv.synthetic.charts import MIN_SIDE_PX, make_chart
from proxyv.synthetic.degrade import degrade
from proxyv.synthetic.documents import make_document, make_text_page
from proxyv.synthetic.infographics import make_infographic
from proxyv.synthetic.page import Page, Split
from proxyv.synthetic.prompts import CHART_PROMPT, DOCUMENT_PROMPT, READ_PROMPT
from proxyv.synthetic.scene_tables import write_scene_sets
from proxyv.synthetic.tables import (
    png_bytes,
    write_ccpdf,
    write_chartqa,
    write_docvqa,
    write_docvqa_test,
    write_infovqa,
)
from proxyv.synthetic.training_kinds import KINDS as FURTHER_KINDS
from proxyv.synthetic.training_kinds import Sizes, Turns, draw_row
from proxyv.synthetic.word_grid import make_word_grid

__all__ = [
    "CHART_PROMPT",
    "DOCUMENT_PROMPT",
    "HELD_OUT_KINDS",
    "READ_PROMPT",
    "HeldOut",
    "Mix",
    "draw_page",
    "write_world",
]

KINDS = ("text", "documents", "charts", "small_charts", "grids")
WRITTEN = {"text": make_text_page, "documents": make_document, "grids": make_word_grid}

_TRAIN_STREAM, _TEST_STREAM, _FURTHER_STREAM, _SCENE_STREAM = 0, 1, 2, 3
_DENSE_STREAM, _TRAIN_FURTHER_STREAM = 4, 5

Seed = tuple[int, ...]
Drawn = TypeVar("Drawn")


@dataclass(frozen=True)
class Mix:
    """Shares of page kinds, normalised to one; number and kinds of questions about a chart.

    ``printed``: whether every chart prints its values.
    """

    text: float = 0.0
    documents: float = 0.5
    charts: float = 0.5
    small_charts: float = 0.0
    grids: float = 0.0
    chart_questions: tuple[int, int] = (3, 6)
    chart_kinds: Sequence[str] = CHART_KINDS
    printed: bool = False


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
        page = make_chart(
            rng,
            split,
            size_hw,
            mix.chart_questions,
            small=kind == "small_charts",
            kinds=mix.chart_kinds,
            printed=mix.printed,
        )
    return degrade(page, rng)


def is_chart(page: Page) -> bool:
    """Whether a page is a chart (else a document)."""
    return page.template.partition("/")[0] in ("bar", "hbar", "grouped", "line", "pie")


def prompt_suffix(page: Page) -> str:
    """The instruction that the benchmark of this kind of page puts behind its questions."""
    return CHART_PROMPT if is_chart(page) else DOCUMENT_PROMPT


HELD_OUT_KINDS = ("documents", "charts", "infographics", "pages", "scenes")
"""Kinds of pages for evaluation, each of which can look like those of training; OCRBench has the
documents of the first kind and its words with the scenes."""


@dataclass(frozen=True)
class HeldOut:
    """How pages for evaluation differ from those of training, besides words and values.

    Attributes:
        familiar: kinds of pages, of `HELD_OUT_KINDS`, that look as in training.
        chart_kinds: of questions about charts.
        printed: whether every chart prints its values.
        text_panels: written panels of an infographic besides the chart and the document.
    """

    familiar: Collection[str] = ()
    chart_kinds: Sequence[str] = CHART_KINDS
    printed: bool = False
    text_panels: int = 2

    def __post_init__(self) -> None:
        """Raises a ValueError about a kind that there is not."""
        for option, given, known in (
            ("familiar", self.familiar, HELD_OUT_KINDS),
            ("chart_kinds", self.chart_kinds, CHART_KINDS),
        ):
            if unknown := sorted({*given} - {*known}):
                raise ValueError(f"{option} {', '.join(unknown)}: one of {', '.join(known)}")
        if not self.chart_kinds:
            raise ValueError(f"chart_kinds is empty: give some of {', '.join(CHART_KINDS)}")
        if not 0 <= self.text_panels <= 2:
            raise ValueError(f"text_panels {self.text_panels}: an infographic has room for 0 to 2")

    def split(self, kind: str) -> Split:
        """The split of a kind of page."""
        return "familiar" if kind in self.familiar else "test"


class Drawing(NamedTuple):
    """How a world is drawn: its seed, sides of pages in pixels, and the processes that draw."""

    seed: int
    side_px: int
    dense_px: int
    workers: int
    held_out: HeldOut

    def pages(
        self, stream: int, count: int, split: Split, mix: Mix
    ) -> Iterator[tuple[Page, bytes]]:
        """Pages in the order of their seeds, with their files."""
        chart = int(mix.charts > 0)
        seeds = [(self.seed, stream, chart, index) for index in range(count)]
        draw = partial(_draw_page, split=split, mix=mix, side_px=self.side_px)
        return self.each(draw, seeds, f"{split} {'charts' if chart else 'documents'}")

    def dense(
        self, kind: str, make: Callable[..., Page], count: int
    ) -> Iterator[tuple[Page, bytes]]:
        """Dense test pages with their files."""
        number = ("pages", "infographics").index(kind)
        seeds = [(self.seed, _DENSE_STREAM, number, index) for index in range(count)]
        split = self.held_out.split(kind)
        draw = partial(_draw_dense, make=make, split=split, side_px=self.dense_px)
        return self.each(draw, seeds, f"dense {kind}")

    def each(
        self, draw: Callable[[Seed], Drawn], seeds: Sequence[Seed], what: str
    ) -> Iterator[Drawn]:
        """What is drawn from each seed, in their order, by several processes."""
        bar = tqdm(total=len(seeds), desc=what, unit="page")
        with ProcessPoolExecutor(self.workers) as pool, bar:
            for result in pool.map(draw, seeds, chunksize=32):
                bar.update()
                yield result


def _draw_page(seed: Seed, split: Split, mix: Mix, side_px: int) -> tuple[Page, bytes]:
    page = draw_page(seed, split, mix, (side_px, side_px))
    return page, png_bytes(page.image)


def _draw_dense(
    seed: Seed, make: Callable[..., Page], split: Split, side_px: int
) -> tuple[Page, bytes]:
    rng = np.random.default_rng(seed)
    page = degrade(make(rng, split, (side_px, side_px)), rng)
    return page, png_bytes(page.image)


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
    train_further: int = 0,
    dense_px: int | None = None,
    familiar: Collection[str] = (),
    chart_kinds: Sequence[str] = CHART_KINDS,
    printed: bool = False,
    text_panels: int = 2,
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
        train_further: pictures of each further kind for training: scenes, words, infographics and
            pages to be read. Their rows stand behind the others, which are the same either way.
        dense_px: side of infographics and of pages to be read, in pixels; by default twice
            ``side_px``.
        familiar: see `HeldOut`, also for the next three.
        chart_kinds: of questions about charts for evaluation.
        printed: whether every chart for evaluation prints its values.
        text_panels: written panels of infographics for evaluation.

    Returns:
        Rows written for each data set.

    Raises:
        ValueError: a count is negative, ``side_px`` or ``dense_px`` is too small to write on, or
            `HeldOut` does not know a kind.
    """
    counts = {
        "train_documents": train_documents,
        "train_charts": train_charts,
        "test_documents": test_documents,
        "test_charts": test_charts,
        "train_further": train_further,
    }
    dense_px = 2 * side_px if dense_px is None else dense_px
    _check(counts, side_px, dense_px if all_benchmarks or train_further else None)
    held_out = HeldOut(familiar, chart_kinds, printed, text_panels)
    drawing = Drawing(seed, side_px, dense_px, workers or os.cpu_count() or 1, held_out)
    only_documents, only_charts = Mix(documents=1, charts=0), Mix(documents=0, charts=1)
    training = TrainingRows(out)
    for kind, mix, count in (
        ("document", only_documents, train_documents),
        ("chart", only_charts, train_charts),
    ):
        pages = drawing.pages(_TRAIN_STREAM, count, "train", mix)
        for index, (page, png) in enumerate(pages):
            rng = np.random.default_rng((seed, _TRAIN_STREAM, index))
            turns = _turns(page, questions_per_page, rng)
            training.add(f"{kind}_{index:06d}", kind, png, page.caption, turns)
    _add_further(training, drawing, train_further, questions_per_page)
    rows = training.write()
    split = held_out.split("documents")
    documents = drawing.pages(_TEST_STREAM, test_documents, split, only_documents)
    rows["docvqa"] = write_docvqa(out / "docvqa", documents, questions_per_page)
    asked = replace(only_charts, chart_kinds=chart_kinds, printed=printed)
    charts = drawing.pages(_TEST_STREAM, test_charts, held_out.split("charts"), asked)
    rows["chartqa"] = write_chartqa(out / "chartqa", charts, questions_per_page)
    if all_benchmarks:
        rows |= _write_further(out, drawing, test_documents, questions_per_page)
    return rows


def _check(counts: dict[str, int], side_px: int, dense_px: int | None) -> None:
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name} {count} is negative; give 0 or more pages")
    if side_px < 112:
        raise ValueError(f"side_px {side_px} is too small to write on; give 112 or more")
    if dense_px is not None and dense_px < 2 * MIN_SIDE_PX:
        raise ValueError(
            f"dense_px {dense_px} is too small for four panels; give {2 * MIN_SIDE_PX} or more"
        )


def _write_further(out: Path, drawing: Drawing, count: int, most: int) -> dict[str, int]:
    """Write the benchmarks besides DocVQA and ChartQA, and DocVQA's test split."""
    mix, held_out = Mix(documents=1, charts=0), drawing.held_out
    documents = list(drawing.pages(_FURTHER_STREAM, count, held_out.split("documents"), mix))
    chart = partial(make_chart, kinds=held_out.chart_kinds, printed=held_out.printed)
    infographic = partial(make_infographic, text_panels=held_out.text_panels, draw_chart=chart)
    infographics = drawing.dense("infographics", infographic, count)
    pages = drawing.dense("pages", make_document, count)
    seeds = [(drawing.seed, _SCENE_STREAM, index) for index in range(count)]
    return {
        "docvqa (test)": write_docvqa_test(out / "docvqa", documents),
        "infovqa": write_infovqa(out / "infovqa", infographics, most),
        "ccpdf": write_ccpdf(out / "ccpdf", pages),
        **write_scene_sets(out, seeds, documents, drawing.side_px, held_out.split("scenes")),
    }


def _add_further(training: TrainingRows, drawing: Drawing, count: int, most: int) -> None:
    """Add rows of every further kind."""
    sizes = Sizes(drawing.side_px, drawing.dense_px, most)
    for number, kind in enumerate(FURTHER_KINDS if count else ()):
        seeds = [(drawing.seed, _TRAIN_FURTHER_STREAM, number, index) for index in range(count)]
        draw = partial(draw_row, kind=kind, sizes=sizes)
        for index, row in enumerate(drawing.each(draw, seeds, f"train {kind}s")):
            training.add(f"{kind}_{index:06d}", kind, row.png, row.caption, row.turns)


class TrainingRows:
    """Both training sets while they are drawn.

    Args:
        out: folder of the small world; pictures are written at once, rows at the end.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.captions: list[dict] = []
        self.conversations: list[dict] = []
        for folder in ("images", "sharegpt4v", "llava_next"):
            (out / folder).mkdir(parents=True, exist_ok=True)

    def add(self, name: str, kind: str, png: bytes, caption: str, turns: Turns) -> None:
        """Write a picture, and keep its caption and its questions."""
        (self.out / "images" / f"{name}.png").write_bytes(png)
        row = {"id": name, "image": f"images/{name}.png"}
        self.captions.append(row | {"conversations": _conversation([(READ_PROMPT, caption)])})
        self.conversations.append(
            row | {"conversations": _conversation(turns), "data_source": f"small_world_{kind}"}
        )

    def write(self) -> dict[str, int]:
        """Write ShareGPT4V's and LLaVA-NeXT-Data's files; returns their numbers of rows."""
        _write_json(self.out / "sharegpt4v" / "captions.json", self.captions)
        _write_json(self.out / "llava_next" / "conversations.json", self.conversations)
        return {"sharegpt4v": len(self.captions), "llava_next": len(self.conversations)}


def _turns(page: Page, most: int, rng: np.random.Generator) -> Turns:
    """At most so many questions about a page, with their answers."""
    chosen = [page.questions[int(index)] for index in rng.permutation(len(page.questions))[:most]]
    return tuple((each.text + prompt_suffix(page), each.answers[0]) for each in chosen)


def _conversation(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Turns in LLaVA's form; the first one has the picture."""
    messages = []
    for place, (asked, answer) in enumerate(turns):
        opening = "<image>\n" if place == 0 else ""
        messages.append({"from": "human", "value": opening + asked})
        messages.append({"from": "gpt", "value": answer})
    return messages


def _write_json(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
