"""The small world: seeded, split cleanly, and written in the schemas of the real data sets."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyv.synthetic.chart_style import LOOKS
from proxyv.synthetic.charts import compose_chart
from proxyv.synthetic.degrade import degrade
from proxyv.synthetic.documents import LAYOUTS, make_document, make_text_page
from proxyv.synthetic.fonts import FAMILIES, families, font_path
from proxyv.synthetic.words import Words, split_of
from proxyv.synthetic.world import (
    CHART_PROMPT,
    DOCUMENT_PROMPT,
    HELD_OUT_KINDS,
    HeldOut,
    Mix,
    draw_page,
    prompt_suffix,
    write_world,
)

DOCUMENTS, CHARTS = Mix(documents=1, charts=0), Mix(documents=0, charts=1)
GRIDS = Mix(documents=0, charts=0, grids=1)
TRAINING_FOLDERS = ("images", "sharegpt4v", "llava_next")


def many(split: str, mix: Mix, count: int, stream: int = 0):
    return [draw_page((5, stream, i), split, mix) for i in range(count)]


@pytest.mark.parametrize("mix", [DOCUMENTS, CHARTS, GRIDS, Mix(text=1, documents=0, charts=0)])
def test_same_seed_same_page(mix: Mix) -> None:
    first, again, other = (draw_page(seed, "train", mix) for seed in [(1, 2), (1, 2), (1, 3)])
    assert first.image.tobytes() == again.image.tobytes()
    assert (first.caption, first.questions, first.glyphs) == (
        again.caption,
        again.questions,
        again.glyphs,
    )
    assert first.image.tobytes() != other.image.tobytes()


def test_neighbours_of_words_are_where_they_stand() -> None:
    """The answer is the nearest word in the direction asked for, by the places of its letters."""
    asked = set()
    for page in many("train", GRIDS, 30):
        words = [word for line in page.caption.splitlines() for word in line.split(" ")]
        places, start = {}, 0
        for word in words:
            letters = page.glyphs[start : start + len(word)]
            assert "".join(glyph.char for glyph in letters) == word
            places[word] = np.mean([(glyph.x, glyph.y) for glyph in letters], axis=0)
            start += len(word)
        for question in page.questions:
            _, _, where, *_, word = question.text.rstrip("?").split(" ")
            away = {other: places[other] - places[word] for other in words if other != word}
            if where in ("above", "below"):
                sign = -1 if where == "above" else 1
                there = {w: d for w, d in away.items() if abs(d[0]) < 12 and sign * d[1] > 6}
            else:
                sign = -1 if where == "left" else 1
                there = {w: d for w, d in away.items() if abs(d[1]) < 6 and sign * d[0] > 12}
            nearest = min(there, key=lambda w: float(np.abs(there[w]).sum()))
            assert question.answers == (nearest,), question
            asked.add(where)
    assert asked == {"above", "below", "left", "right"}


def test_splits_share_no_typeface_layout_or_page() -> None:
    train, test = many("train", DOCUMENTS, 120), many("test", DOCUMENTS, 120)
    assert {p.template for p in train}.isdisjoint({p.template for p in test})
    assert {p.image.tobytes() for p in train}.isdisjoint({p.image.tobytes() for p in test})
    for kind, layouts in LAYOUTS.items():
        assert set(layouts["train"]).isdisjoint(layouts["test"]), kind
    faces = {
        split: {font_path(f, face) for f in FAMILIES if f.split == split for face in f.regular}
        for split in ("train", "test")
    }
    assert faces["train"].isdisjoint(faces["test"]) and all(len(f) >= 3 for f in faces.values())


def test_splits_share_no_document_value() -> None:
    def values(split: str) -> set[str]:
        pages = many(split, DOCUMENTS, 250)
        return {a for p in pages for q in p.questions for a in q.answers if len(a) >= 3}

    train, test = values("train"), values("test")
    assert len(train) > 500 and len(test) > 500
    bare = {value.removeprefix("Mr. ").removeprefix("Mrs. ").removeprefix("Dr. ") for value in test}
    assert train.isdisjoint(test) and train.isdisjoint(bare)


def test_familiar_pages_have_new_words_in_known_looks(tmp_path: Path) -> None:
    """Their content is the test half's, their typefaces, looks and layouts are training's."""
    pages = many("familiar", DOCUMENTS, 60)
    known = {p.template for p in many("train", DOCUMENTS, 200)}
    assert {p.template for p in pages} <= known
    answers = {a for p in pages for q in p.questions for a in q.answers if len(a) >= 3}
    trained = many("train", DOCUMENTS, 250)
    assert answers.isdisjoint(a for p in trained for q in p.questions for a in q.answers)
    assert families("familiar") == families("train") != families("test")
    for seed in range(40):
        rng = np.random.default_rng((6, seed))
        chart, style, _ = compose_chart(rng, "familiar", (168, 168))
        assert split_of(chart.title) == "test"
        assert style.title in LOOKS["train"].titles and style.legend in LOOKS["train"].legends

    counts = {"train_documents": 2, "train_charts": 1, "test_documents": 12, "test_charts": 2}
    for name, familiar in (("unseen", ()), ("familiar", HELD_OUT_KINDS)):
        write_world(
            tmp_path / name, seed=4, workers=1, all_benchmarks=True, familiar=familiar, **counts
        )
    unseen, familiar = (
        {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "unseen", tmp_path / "familiar")
    )
    trained = {name for name in unseen if name.startswith(TRAINING_FOLDERS)}
    assert trained == {name for name in familiar if name.startswith(TRAINING_FOLDERS)}
    assert len(unseen) == len(familiar)
    assert {name for name in unseen if unseen[name] == familiar.get(name)} == trained


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("documents", {"docvqa", "ocrbench"}),
        ("charts", {"chartqa"}),
        ("infographics", {"infovqa"}),
        ("pages", {"ccpdf"}),
        ("scenes", {"gqa", "mmbench", "mme", "ocrbench", "refcoco", "seedbench", "textvqa"}),
    ],
)
def test_one_kind_of_page_can_be_familiar_alone(
    kind: str, changed: set[str], unseen: dict[str, bytes], tmp_path: Path
) -> None:
    write_world(tmp_path, **SMALL_WORLD, familiar=[kind])
    assert different(contents(tmp_path), unseen) == changed


SMALL_WORLD = {
    "seed": 4, "workers": 1, "all_benchmarks": True, "train_documents": 1, "train_charts": 1,
    "test_documents": 12, "test_charts": 6,
}  # fmt: skip


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def different(first: dict[str, bytes], second: dict[str, bytes]) -> set[str]:
    """Folders with a file that is not the same in both."""
    names = first.keys() | second.keys()
    return {name.partition("/")[0] for name in names if first.get(name) != second.get(name)}


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("unseen")
    write_world(root, **SMALL_WORLD)
    return contents(root)


def test_charts_are_asked_only_the_kinds_wanted_and_training_stays(
    unseen: dict[str, bytes], tmp_path: Path
) -> None:
    write_world(tmp_path, **SMALL_WORLD, chart_kinds=["count", "compare"], printed=True)
    assert different(contents(tmp_path), unseen) == {"chartqa", "infovqa"}
    files = str(tmp_path / "chartqa" / "*.parquet")
    asked = datasets.load_dataset("parquet", data_files=files)["train"]
    assert {q.split()[0] for q in asked["question"]} == {"How", "Is"}


def test_infographics_alone_lose_their_text(unseen: dict[str, bytes], tmp_path: Path) -> None:
    write_world(tmp_path, **SMALL_WORLD, text_panels=0)
    assert different(contents(tmp_path), unseen) == {"infovqa"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"familiar": ["chart"]}, "familiar chart: one of documents"),
        ({"chart_kinds": ["sums"]}, "chart_kinds sums: one of lookup"),
        ({"chart_kinds": []}, "chart_kinds is empty"),
        ({"text_panels": 3}, "text_panels 3"),
    ],
)
def test_unknown_kinds_of_pages_and_questions_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeldOut(**options)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["train", "test"]))
@settings(max_examples=40, deadline=None)
def test_every_value_belongs_to_its_split(seed: int, split: str) -> None:
    words = Words(np.random.default_rng(seed), split)
    makers = [
        words.person, words.company, words.city, words.street, words.job, words.product,
        words.date, words.time, words.phone, words.code, words.money, words.email, words.measure,
    ]  # fmt: skip
    for make in makers:
        value = make()
        assert len(value) < 3 or split_of(value) == split
        assert value == value.strip() and value.isascii()


def test_split_of_ignores_case_and_space() -> None:
    assert split_of(" Maria JENSEN ") == split_of("maria jensen")
    share = np.mean([split_of(str(number)) == "test" for number in range(2000)])
    assert 0.15 < share < 0.25


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_stand_on_the_page(split: str) -> None:
    for page in many(split, DOCUMENTS, 60):
        text = " ".join(page.caption.split())  # a letter may break a line within an answer
        for question in page.questions:
            assert any(answer in text for answer in question.answers), question
        written = "".join(glyph.char for glyph in page.glyphs)
        assert written == "".join(page.caption.split())
        assert all(-6 <= g.x <= 174 and -6 <= g.y <= 174 for g in page.glyphs)


def test_glyphs_lie_on_ink() -> None:
    """Removing the ink at a glyph's place must be visible: the pixel there is near the text."""
    for seed in range(12):
        page = make_text_page(np.random.default_rng(seed), "train")
        pixels = np.asarray(page.image.convert("L"), dtype=float)
        paper = np.median(pixels)
        found = 0
        for glyph in page.glyphs:
            y, x = round(glyph.y), round(glyph.x)
            found += pixels[max(0, y - 5) : y + 6, max(0, x - 3) : x + 4].min() < paper - 40
        assert found / len(page.glyphs) > 0.97


def test_skew_moves_glyphs_with_the_ink() -> None:
    """A single dark dot and its glyph stay together under the wear."""
    from PIL import Image

    from proxyv.synthetic.page import Glyph, Page

    image = Image.new("RGB", (168, 168), "white")
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            image.putpixel((140 + dx, 30 + dy), (0, 0, 0))
    page = Page(image, [Glyph(".", 140.5, 30.5)], ".", [], "dot", "train")
    moved = 0
    for seed in range(20):
        worn = degrade(page, np.random.default_rng(seed))
        pixels = np.asarray(worn.image.convert("L"), dtype=float)
        y, x = np.unravel_index(pixels[4:-4, 4:-4].argmin(), (160, 160))
        assert abs(x + 4.5 - worn.glyphs[0].x) < 2.1 and abs(y + 4.5 - worn.glyphs[0].y) < 2.1
        moved += abs(worn.glyphs[0].x - 140.5) > 0.5
    assert moved > 3


def test_degrade_strength() -> None:
    page = make_document(np.random.default_rng(1), "train")
    assert degrade(page, np.random.default_rng(0), strength=0.0) is page
    with pytest.raises(ValueError, match=r"strength 1\.5"):
        degrade(page, np.random.default_rng(0), strength=1.5)


def test_larger_pages_hold_more() -> None:
    small = [len(make_document(np.random.default_rng(i), "train").glyphs) for i in range(30)]
    large = [
        len(make_document(np.random.default_rng(i), "train", (336, 336)).glyphs) for i in range(30)
    ]
    assert np.mean(large) > 1.3 * np.mean(small)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    rows = write_world(
        out, seed=3, train_documents=6, train_charts=6, test_documents=5, test_charts=8, workers=2
    )
    assert rows["sharegpt4v"] == rows["llava_next"] == 12
    return out


def test_training_files(world: Path) -> None:
    captions = json.loads((world / "sharegpt4v/captions.json").read_text())
    talks = json.loads((world / "llava_next/conversations.json").read_text())
    for row in [*captions, *talks]:
        values = [turn["value"] for turn in row["conversations"]]
        assert sum(value.count("<image>") for value in values) == 1
        assert values[0].startswith("<image>\n")
        roles = [turn["from"] for turn in row["conversations"]]
        assert roles == ["human", "gpt"] * (len(roles) // 2)
    assert all((world / row["image"]).is_file() for row in [*captions, *talks])
    asked = [t["value"] for row in talks for t in row["conversations"] if t["from"] == "human"]
    assert all(value.endswith((DOCUMENT_PROMPT, CHART_PROMPT)) for value in asked)
    assert {row["data_source"] for row in talks} == {"small_world_document", "small_world_chart"}


def test_benchmark_files(world: Path) -> None:
    documents = datasets.Dataset.from_parquet(str(world / "docvqa/validation.parquet"))
    charts = datasets.Dataset.from_parquet(str(world / "chartqa/test.parquet"))
    assert set(documents.column_names) == {
        "questionId", "question", "question_types", "image", "docId", "ucsf_document_id",
        "ucsf_document_page_no", "answers", "data_split",
    }  # fmt: skip
    assert set(charts.column_names) == {"type", "question", "answer", "image"}
    assert documents[0]["image"].size == (168, 168)
    types = charts["type"]
    assert set(types) <= {"human_test", "augmented_test"}
    assert list(types) == sorted(types, reverse=True)  # human questions first, as in the original
    assert len(set(documents["questionId"])) == len(documents)


def test_worlds_are_reproducible(tmp_path: Path) -> None:
    counts = {"train_documents": 3, "train_charts": 0, "test_documents": 2, "test_charts": 0}
    for name, workers in (("a", 1), ("b", 2)):
        write_world(tmp_path / name, seed=4, workers=workers, **counts)
    for file in ("llava_next/conversations.json", "images/document_000001.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_bad_counts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_charts -1"):
        write_world(tmp_path, train_charts=-1)
    with pytest.raises(ValueError, match="side_px 20"):
        write_world(tmp_path, side_px=20)


def test_prompt_suffix_by_kind() -> None:
    assert prompt_suffix(draw_page((1, 1), "train", DOCUMENTS)) == DOCUMENT_PROMPT
    assert prompt_suffix(draw_page((1, 1), "train", CHARTS)) == CHART_PROMPT


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_seed_fails(split: str) -> None:
    """A drawn text that does not fit means another draw, never an error."""
    rng = np.random.default_rng(8)
    for _ in range(400):
        page = make_document(rng, split)
        assert len(page.questions) >= 2
