"""Rows of scenes in the schemas of the benchmarks about photographs, and of OCRBench.

Every table is written from the same scenes: questions about colours, numbers, places and words,
boxes of shapes and signs. ``write_scene_sets`` is the entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from proxyv.synthetic.page import Page, Split
from proxyv.synthetic.prompts import SIGN_QUESTION
from proxyv.synthetic.scenes import COLOURS, SIGN_LETTERS, Scene, Thing, make_scene
from proxyv.synthetic.tables import (
    ENCODED,
    INTEGER,
    TEXT,
    TEXTS,
    encoded,
    png_bytes,
    write_parquet,
)
from proxyv.synthetic.word_images import FORMULA, WRITTEN, word_image, word_question
from proxyv.synthetic.words import Words

__all__ = ["write_scene_sets"]

LETTERS = "ABCD"
ROTATION = 1_000_000


class Choice(NamedTuple):
    """A multiple-choice question; the first option is the right one."""

    kind: str
    question: str
    options: tuple[str, str, str, str]


class Drawn(NamedTuple):
    """A scene, its picture as a file, and the questions about it."""

    scene: Scene
    png: bytes
    choices: tuple[Choice, ...]


def write_scene_sets(
    out: Path,
    seeds: Sequence[tuple[int, ...]],
    pages: Sequence[tuple[Page, bytes]],
    side_px: int,
    split: Split = "test",
) -> dict[str, int]:
    """Write every benchmark that asks about scenes.

    Args:
        out: folder of the small world; each benchmark gets a folder in it.
        seeds: one for each scene.
        pages: test documents, which OCRBench asks about too.
        side_px: side of a scene in pixels.
        split: decides words, typefaces and layouts.

    Returns:
        Rows written for each benchmark.
    """
    drawn = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        scene = make_scene(rng, split, (side_px, side_px))
        drawn.append(Drawn(scene, png_bytes(scene.image), _choices(scene, Words(rng, split))))
    writers: dict[str, Callable[[Path, Sequence[Drawn]], int]] = {
        "textvqa": _write_textvqa,
        "mme": _write_mme,
        "mmbench": _write_mmbench,
        "seedbench": _write_seedbench,
        "gqa": _write_gqa,
        "refcoco": _write_refcoco,
    }
    rows = {name: write(out / name, drawn) for name, write in writers.items()}
    rng = np.random.default_rng((*seeds[0], 1)) if seeds else np.random.default_rng(0)
    words = Words(rng, split)
    rows["ocrbench"] = _write_ocrbench(out / "ocrbench", drawn, pages, words, side_px, split)
    return rows


def _choices(scene: Scene, words: Words) -> tuple[Choice, ...]:
    """A question each about colour, number, place and word."""
    rng = words.rng
    thing = scene.shapes[0]
    seen = {each.colour for each in scene.shapes}
    absent = [colour for colour in (*COLOURS, "pink", "brown") if colour not in seen]
    count = len(scene.shapes)
    wrong_counts = [number for number in range(1, 8) if number != count]
    places = [f"{y} {x}" for y in ("top", "middle", "bottom") for x in ("left", "center", "right")]
    free = [place for place in places if place not in {each.place for each in scene.shapes}]
    wrong_words: list[str] = []
    while len(wrong_words) < 3:
        word = words.noun(SIGN_LETTERS)
        if word != scene.sign.word and word not in wrong_words:
            wrong_words.append(word)
    return (
        Choice(
            "color",
            f"What color is the {thing.shape} at the {thing.place}?",
            _four(thing.colour, rng.permutation(absent)[:3]),
        ),
        Choice(
            "count",
            "How many shapes are in the image, without the sign?",
            _four(str(count), rng.permutation(wrong_counts)[:3]),
        ),
        Choice(
            "position",
            f"Where is the {thing.name}?",
            _four(thing.place, rng.permutation(free)[:3]),
        ),
        Choice("text", SIGN_QUESTION, _four(scene.sign.word, wrong_words)),
    )


def _four(right: str, wrong: Iterable[Any]) -> tuple[str, str, str, str]:
    first, second, third = map(str, wrong)
    return right, first, second, third


def _write_textvqa(folder: Path, drawn: Sequence[Drawn]) -> int:
    """TextVQA's validation split; nine of ten people agree, the last one writes small letters."""
    rows = []
    for place, (scene, png, _) in enumerate(drawn):
        question = SIGN_QUESTION.lower()
        rows.append(
            {
                "image_id": f"small{place:05d}",
                "question_id": place,
                "question": question,
                "question_tokens": question.rstrip("?").split(),
                "image": encoded(png),
                "image_width": scene.image.width,
                "image_height": scene.image.height,
                "flickr_original_url": "",
                "flickr_300k_url": "",
                "answers": [scene.sign.word] * 9 + [scene.sign.word.lower()],
                "image_classes": ["Sign"],
                "set_name": "val",
                "ocr_tokens": [scene.sign.word],
            }
        )
    small = datasets.Value("int32")
    features = {
        "image_id": TEXT,
        "question_id": small,
        "question": TEXT,
        "question_tokens": TEXTS,
        "image": ENCODED,
        **dict.fromkeys(("image_width", "image_height"), small),
        **dict.fromkeys(("flickr_original_url", "flickr_300k_url"), TEXT),
        **dict.fromkeys(("answers", "image_classes"), TEXTS),
        "set_name": TEXT,
        "ocr_tokens": TEXTS,
    }
    return write_parquet(folder / "validation.parquet", rows, features)


def _write_mme(folder: Path, drawn: Sequence[Drawn]) -> int:
    """MME: for each scene and category one question to affirm and one to deny."""
    rows = []
    for place, (scene, png, (colour, count, position, text)) in enumerate(drawn):
        thing = scene.shapes[0]
        absent = f"{colour.options[1]} {thing.shape}"
        questions = {
            "existence": ("Is there a {} in this image?", thing.name, absent),
            "count": ("Are there {} shapes besides the sign?", count.options[0], count.options[1]),
            "position": (f"Is the {thing.name} at the {{}}?", thing.place, position.options[1]),
            "color": (
                f"Is the {thing.shape} at the {thing.place} {{}}?",
                thing.colour,
                colour.options[1],
            ),
            "OCR": ('Is the word on the sign "{}"?', text.options[0], text.options[1]),
        }
        rows += [
            {
                "question_id": f"{category}/{place:04d}.png",
                "image": encoded(png),
                "question": f"{form.format(value)} Please answer yes or no.",
                "answer": answer,
                "category": category,
            }
            for category, (form, right, wrong) in questions.items()
            for value, answer in ((right, "Yes"), (wrong, "No"))
        ]
    features = dict.fromkeys(("question_id", "image", "question", "answer", "category"), TEXT)
    return write_parquet(folder / "test.parquet", rows, features | {"image": ENCODED})


def _write_mmbench(folder: Path, drawn: Sequence[Drawn]) -> int:
    """MMBench's dev split: every question with all rotations of its options."""
    rows: list[dict[str, Any]] = []
    for place, (_, png, choices) in enumerate(drawn):
        for number, (kind, question, options) in enumerate(choices):
            for turn in range(len(LETTERS)):
                turned = options[-turn:] + options[:-turn] if turn else options
                rows.append(
                    {
                        "index": turn * ROTATION + len(choices) * place + number,
                        "question": question,
                        "hint": "nan",
                        "answer": LETTERS[turn],
                        **dict(zip(LETTERS, turned, strict=True)),
                        "category": kind,
                        "image": encoded(png),
                        "source": "small world",
                        "L2-category": "perception",
                        "comment": "nan",
                        "split": "dev",
                    }
                )
    rows.sort(key=lambda row: row["index"])
    features = {
        "index": INTEGER,
        **dict.fromkeys(("question", "hint", "answer", *LETTERS, "category"), TEXT),
        "image": ENCODED,
        **dict.fromkeys(("source", "L2-category", "comment", "split"), TEXT),
    }
    return write_parquet(folder / "dev.parquet", rows, features)


def _write_seedbench(folder: Path, drawn: Sequence[Drawn]) -> int:
    """SEED-Bench: lists of one image; the right option moves from question to question."""
    rows = []
    for place, (_, png, choices) in enumerate(drawn):
        for number, (_, question, options) in enumerate(choices):
            turn = (place + number) % len(LETTERS)
            turned = options[-turn:] + options[:-turn] if turn else options
            texts = {f"choice_{x.lower()}": text for x, text in zip(LETTERS, turned, strict=True)}
            rows.append(
                {
                    "answer": LETTERS[turn],
                    **texts,
                    "data_id": f"small{place:05d}",
                    "data_type": "image",
                    "question": question,
                    "question_id": f"{place}_{number}",
                    "question_type_id": number + 1,
                    "segment": None,
                    "image": [encoded(png)],
                }
            )
    features = {
        **dict.fromkeys(("answer", *(f"choice_{x.lower()}" for x in LETTERS)), TEXT),
        **dict.fromkeys(("data_id", "data_type", "question", "question_id"), TEXT),
        "question_type_id": INTEGER,
        "segment": datasets.List(INTEGER),
        "image": datasets.List(ENCODED),
    }
    return write_parquet(folder / "test.parquet", rows, features)


def _write_gqa(folder: Path, drawn: Sequence[Drawn]) -> int:
    """GQA's test-dev split: the questions in one table, the images in another."""
    rows, images = [], []
    for place, (scene, png, (colour, *_)) in enumerate(drawn):
        thing, other = scene.shapes[:2]
        images.append({"id": f"small{place:05d}", "image": encoded(png)})
        left = "yes" if thing.column < other.column else "no"
        questions = (
            (colour.question, thing.colour, f"The {thing.shape} is {thing.colour}."),
            (f"Is the {thing.name} to the left of the {other.name}?", left, f"{left}."),
            (f"Is there a {colour.options[1]} {thing.shape}?", "no", "No, there is not."),
        )
        rows += [
            {
                "id": f"{place:05d}{number}",
                "imageId": f"small{place:05d}",
                "question": question,
                "isBalanced": True,
                "answer": answer,
                "fullAnswer": full,
            }
            for number, (question, answer, full) in enumerate(questions)
        ]
    features = {
        **dict.fromkeys(("id", "imageId", "question"), TEXT),
        "isBalanced": datasets.Value("bool"),
        **dict.fromkeys(("answer", "fullAnswer"), TEXT),
    }
    pictures = folder / "testdev_balanced_images" / "testdev.parquet"
    write_parquet(pictures, images, {"id": TEXT, "image": ENCODED})
    path = folder / "testdev_balanced_instructions" / "testdev.parquet"
    return write_parquet(path, rows, features)


def _write_refcoco(folder: Path, drawn: Sequence[Drawn]) -> int:
    """RefCOCO: shapes in part A, signs in part B, two sentences each."""
    rows: dict[str, list[dict[str, Any]]] = {"testA": [], "testB": []}
    for place, (scene, png, _) in enumerate(drawn):
        for thing in (*scene.shapes, scene.sign):
            part = "testB" if thing is scene.sign else "testA"
            rows[part].append(_refcoco_row(f"{place}_{len(rows[part])}", place, thing, png))
    numbers = datasets.List(datasets.Value("float32"))
    features = {
        "question_id": TEXT,
        "image": ENCODED,
        "question": TEXT,
        "answer": TEXTS,
        **dict.fromkeys(("segmentation", "bbox"), numbers),
        "iscrowd": datasets.Value("int8"),
        "file_name": TEXT,
    }
    return sum(
        write_parquet(folder / f"{part}.parquet", found, features) for part, found in rows.items()
    )


def _refcoco_row(name: str, place: int, thing: Thing, png: bytes) -> dict[str, Any]:
    left, top, right, bottom = thing.box
    return {
        "question_id": name,
        "image": encoded(png),
        "question": "Please describe the marked thing.",
        "answer": list(thing.sentences),
        "segmentation": [left, top, right, top, right, bottom, left, bottom],
        "bbox": [left, top, right - left, bottom - top],
        "iscrowd": 0,
        "file_name": f"small_{place:05d}.png",
    }


def _write_ocrbench(
    folder: Path,
    drawn: Sequence[Drawn],
    pages: Sequence[tuple[Page, bytes]],
    words: Words,
    side_px: int,
    split: Split,
) -> int:
    """OCRBench: for each scene one row of one of its ten categories, in turn."""
    rows = []
    asked = ("Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction")
    categories = [*WRITTEN, *asked]
    for place, (scene, png, _) in enumerate(drawn):
        category = categories[place % len(categories)]
        if category in WRITTEN:
            question, answer = word_question(category), WRITTEN[category](words)
            png = png_bytes(word_image(words.rng, split, answer, category, side_px))
        elif category == "Scene Text-centric VQA":
            question, answer = SIGN_QUESTION, scene.sign.word
        else:
            page, png = pages[place % len(pages)]
            question, answer = page.questions[0].text, page.questions[0].answers[0]
        rows.append(
            {
                "dataset": "HME100k" if category == FORMULA else "small world",
                "question": question,
                "question_type": category,
                "answer": [answer],
                "image": encoded(png),
            }
        )
    features: dict[str, Any] = dict.fromkeys(("dataset", "question", "question_type"), TEXT)
    features |= {"answer": TEXTS, "image": ENCODED}
    return write_parquet(folder / "test.parquet", rows, features)
