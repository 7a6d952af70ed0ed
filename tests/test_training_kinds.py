"""The small world's further training rows: asked as evaluation asks, answered as it scores."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from proxyv.eval.benchmarks import BENCHMARKS
from proxyv.eval.sources import load_rows
from proxyv.synthetic.charts import make_chart
from proxyv.synthetic.infographics import LAYOUTS, make_infographic
from proxyv.synthetic.prompts import BOX_PROMPT, DOCUMENT_PROMPT, PAGE_PROMPT, SIGN_QUESTION
from proxyv.synthetic.scenes import make_scene
from proxyv.synthetic.training_kinds import KINDS, Row, Sizes, box_text, draw_row
from proxyv.synthetic.word_images import BANDS, FORMULA, WRITTEN, word_question
from proxyv.synthetic.words import Words, split_of
from proxyv.synthetic.world import write_world

SIZES = Sizes(side_px=168, dense_px=336, most=5)
COUNTS = {"train_documents": 2, "train_charts": 2, "test_documents": 10, "test_charts": 1}


def rows_of(kind: str, count: int) -> list[Row]:
    return [draw_row((7, index), kind, SIZES) for index in range(count)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    rows = write_world(out, seed=3, workers=2, train_further=3, all_benchmarks=True, **COUNTS)
    assert rows["sharegpt4v"] == rows["llava_next"] == 4 + 3 * len(KINDS)
    return out


def test_further_rows_leave_everything_else_as_it_was(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path, seed=3, workers=1, **COUNTS)
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    annotations = {Path("sharegpt4v/captions.json"), Path("llava_next/conversations.json")}
    assert annotations < before
    for file in before - annotations:
        assert (tmp_path / file).read_bytes() == (world / file).read_bytes(), file
    for file in annotations:
        old, new = (json.loads((folder / file).read_text()) for folder in (tmp_path, world))
        assert new[: len(old)] == old and len(new) > len(old)


def test_rows_are_files_in_the_schema_of_the_training_sets(world: Path) -> None:
    captions = json.loads((world / "sharegpt4v/captions.json").read_text())[4:]
    talks = json.loads((world / "llava_next/conversations.json").read_text())[4:]
    assert [row["data_source"] for row in talks] == [
        f"small_world_{kind}" for kind in KINDS for _ in range(3)
    ]
    assert [row["image"] for row in talks] == [row["image"] for row in captions]
    for row in [*captions, *talks]:
        assert (world / row["image"]).is_file()
        values = [turn["value"] for turn in row["conversations"]]
        assert [turn["from"] for turn in row["conversations"]] == (
            ["human", "gpt"] * (len(values) // 2)
        )
        assert [value.count("<image>") for value in values] == [1] + [0] * (len(values) - 1)
        assert values[0].startswith("<image>\n") and all(values)


def asked_and_right(task: str, row: dict, prompt: str, answer: str) -> bool:
    """Whether a benchmark asks a row in these words, and gives the answer the full score."""
    benchmark = BENCHMARKS[task]
    sample = benchmark.sample(0, {"question_id": 0, "questionId": 0, **row})
    if benchmark.needs_image_size:
        sample = benchmark.with_image_size(sample, (SIZES.side_px, SIZES.side_px))
    score = benchmark.score(answer, sample.references, sample.details)
    return sample.prompt == prompt and score == 1.0


def test_scenes_are_asked_as_textvqa_ocrbench_and_refcoco_ask() -> None:
    asked = {"textvqa": 0, "ocrbench": 0, "refcoco_testA": 0, "refcoco_testB": 0}
    for index, row in enumerate(rows_of("scene", 40)):
        scene = make_scene(np.random.default_rng((7, index)), "train", (168, 168))
        assert len(row.turns) == 3
        for prompt, answer in row.turns:
            if prompt.startswith(BOX_PROMPT):
                sentence = prompt.removeprefix(BOX_PROMPT)
                things = (*scene.shapes, scene.sign)
                [thing] = [thing for thing in things if sentence in thing.sentences]
                left, top, right, bottom = thing.box
                bbox = [left, top, right - left, bottom - top]
                task = "refcoco_testB" if thing is scene.sign else "refcoco_testA"
                asked_row = {"answer": sentence, "bbox": bbox}
            else:
                task = "textvqa" if prompt.endswith(DOCUMENT_PROMPT) else "ocrbench"
                question = SIGN_QUESTION.lower() if task == "textvqa" else SIGN_QUESTION
                word = scene.sign.word
                asked_row = {"question": question, "answers": [word] * 10, "answer": [word]}
                asked_row |= {"question_type": "Scene Text-centric VQA", "dataset": "small world"}
                assert answer == word
            assert asked_and_right(task, asked_row, prompt, answer), prompt
            asked[task] += 1
    assert all(count >= 8 for count in asked.values()), asked


def test_boxes_are_rounded_shares_of_width_and_height() -> None:
    assert box_text((10, 40, 50, 80), (100, 200)) == "[0.05, 0.40, 0.25, 0.80]"


@pytest.mark.parametrize("seed", range(12))
def test_signs_for_training_are_framed_by_their_box_and_show_the_word(seed: int) -> None:
    scene = make_scene(np.random.default_rng(seed), "train", (168, 168))
    left, top, right, bottom = scene.sign.box
    pixels = np.asarray(scene.image).astype(int)
    assert 0 <= left and 0 <= top and right <= 168 and bottom <= 168
    frame = pixels[top, left]
    for edge in (
        pixels[top, left:right], pixels[bottom - 1, left:right],
        pixels[top:bottom, left], pixels[top:bottom, right - 1],
    ):  # fmt: skip
        assert (edge == frame).all()
    inside = pixels[top + 1 : bottom - 1, left + 1 : right - 1]
    letters = inside.max(-1) < 100
    assert letters.sum() > 20 and np.median(inside.min(-1)) >= 235
    rows, columns = np.nonzero(letters)
    assert rows.max() - rows.min() >= 5 and columns.max() - columns.min() >= 8


def test_things_for_training_stand_anywhere_in_the_cell_they_are_said_to_stand_in() -> None:
    offsets = []
    for seed in range(40):
        scene = make_scene(np.random.default_rng(seed), "train", (168, 168))
        for thing in (*scene.shapes, scene.sign):
            left, top, right, bottom = thing.box
            y, x = (top + bottom) / 2, (left + right) / 2
            assert (int(y // 56), int(x // 56)) == (thing.row, thing.column)
            offsets.append((y % 56 - 28, x % 56 - 28))
        lines = scene.caption.splitlines()
        assert len(lines) == len(scene.shapes) + 1
        assert all(any(each.place in line for line in lines) for each in scene.shapes)
    assert (np.abs(offsets).max(0) > 9).all() and (np.std(offsets, axis=0) > 2).all()


def test_words_are_asked_as_ocrbench_asks(world: Path) -> None:
    rows = load_rows(BENCHMARKS["ocrbench"], world)
    evaluated = {
        sample.kind: sample.prompt
        for sample in (BENCHMARKS["ocrbench"].sample(i, rows.text(i)) for i in range(len(rows)))
    }
    assert {kind: evaluated[kind] for kind in WRITTEN} == {
        kind: word_question(kind) for kind in WRITTEN
    }
    seen, documents = set(), 0
    for row in rows_of("word", 60):
        for prompt, answer in row.turns:
            formula = prompt == evaluated[FORMULA]
            question = {
                "question": prompt, "answer": [answer],
                "question_type": FORMULA if formula else "Doc-oriented VQA",
                "dataset": "HME100k" if formula else "small world",
            }  # fmt: skip
            assert asked_and_right("ocrbench", question, prompt, answer)
        if row.turns[0][0] in evaluated.values():
            seen.add(row.turns[0][0])
            assert row.turns[0][1] == row.caption and len(row.turns) == 1
        else:
            documents += 1
            text = " ".join(row.caption.split())
            assert all(answer in text for _, answer in row.turns)
    assert len(seen) == 2 and 3 < documents < 30


def test_infographics_are_asked_as_infovqa_asks_and_can_be_answered() -> None:
    for row in rows_of("infographic", 6):
        for prompt, answer in row.turns:
            question = prompt.removesuffix(DOCUMENT_PROMPT)
            given = {"question": question, "answers": [answer], "image_url": "x"}
            assert asked_and_right("infovqa", given, prompt, answer)


@pytest.mark.parametrize("written", [0, 1, 2])
def test_panels_of_text_can_be_left_empty(written: int) -> None:
    for seed in range(6):
        page = make_infographic(
            np.random.default_rng(seed),
            "familiar",
            text_panels=written,
            draw_chart=partial(make_chart, kinds=["count"], printed=True),
        )
        assert page.values_shown
        panels = {(int(glyph.y // 168), int(glyph.x // 168)) for glyph in page.glyphs}
        assert len(panels) == 2 + written
        pixels = np.asarray(page.image)
        plain = [
            (row, column)
            for row in (0, 1)
            for column in (0, 1)
            if (pixels[168 * row :, 168 * column :][:168, :168] == 255).all()
        ]
        assert len(plain) == 2 - written and panels.isdisjoint(plain)
        asked = [question for question in page.questions if question.kind == "count"]
        assert len(asked) == 1 and page.questions[0] == asked[0]
        assert "\n\n" not in page.caption and page.caption


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_about_infographics_stand_on_them(split: str) -> None:
    kinds = set()
    for seed in range(12):
        page = make_infographic(np.random.default_rng(seed), split)
        assert page.image.size == (336, 336)
        chart_at, document_at = (int(digit) for digit in page.template.split("/")[1])
        assert (chart_at, document_at) in LAYOUTS[split]
        written = "".join(glyph.char for glyph in page.glyphs)
        for question in page.questions:
            answers = ["".join(answer.split()) for answer in question.answers]
            off_axis = not page.values_shown and answers[0].replace(".", "").isdigit()
            if question.kind in ("lookup", "text") and not off_axis:
                assert any(answer in written for answer in answers), question
            kinds.add(question.kind)
        assert page.questions[0].text != page.questions[1].text
        # Every panel is written on, and letters lie where the picture is not plain.
        panels = {(int(glyph.y // 168), int(glyph.x // 168)) for glyph in page.glyphs}
        assert len(panels) == 4
        pixels = np.asarray(page.image.convert("L"), dtype=float)
        near = [
            np.ptp(pixels[max(0, y - 6) : y + 7, max(0, x - 6) : x + 7])
            for y, x in ((round(glyph.y), round(glyph.x)) for glyph in page.glyphs)
        ]
        assert np.mean(np.array(near) > 40) > 0.97
    assert {"lookup", "extremum"} <= kinds


def test_pages_are_asked_as_ccpdf_asks(world: Path) -> None:
    benchmark = BENCHMARKS["ccpdf"]
    rows = load_rows(benchmark, world)
    assert {benchmark.sample(i, rows.text(i)).prompt for i in range(len(rows))} == {PAGE_PROMPT}
    for row in rows_of("page", 4):
        ((prompt, answer),) = row.turns
        assert prompt == PAGE_PROMPT and answer == row.caption
        assert benchmark.score(answer, [row.caption]) == 1.0


def test_splits_share_no_layout_or_value() -> None:
    assert set(LAYOUTS["train"]).isdisjoint(LAYOUTS["test"])
    assert set(BANDS["train"]).isdisjoint(BANDS["test"])
    scenes = {
        split: [make_scene(np.random.default_rng((1, i)), split) for i in range(60)]
        for split in ("train", "test")
    }
    assert {scene.layout for scene in scenes["train"]}.isdisjoint(
        scene.layout for scene in scenes["test"]
    )
    for split, found in scenes.items():
        assert {split_of(s.sign.word) for s in found if len(s.sign.word) >= 3} == {split}
        words = Words(np.random.default_rng(5), split)
        values = [write(words) for write in WRITTEN.values() for _ in range(30)]
        assert {split_of(value) for value in values if len(value) >= 3} == {split}
    for row in rows_of("word", 40):
        for _, answer in row.turns:
            bare = answer.removeprefix("Mr. ").removeprefix("Mrs. ").removeprefix("Dr. ")
            assert len(bare) < 3 or split_of(bare) == "train", answer


def test_sums_add_up() -> None:
    words = Words(np.random.default_rng(2), "train")
    for _ in range(50):
        left, right = words.sum().split(" = ")
        first, second = left.split(" + ")
        assert int(first) + int(second) == int(right)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_same_seed_gives_the_same_row(kind: str) -> None:
    first, again, other = (draw_row(seed, kind, SIZES) for seed in [(1, 2), (1, 2), (1, 3)])
    assert first == again != other


def test_at_most_so_many_turns() -> None:
    for kind in KINDS:
        few = [draw_row((4, i), kind, SIZES._replace(most=1)) for i in range(4)]
        assert {len(row.turns) for row in few} == {1}


def test_bad_sizes_and_counts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_further -2"):
        write_world(tmp_path, train_further=-2)
    with pytest.raises(ValueError, match=r"dense_px 300.*320"):
        write_world(tmp_path, train_further=1, dense_px=300)
