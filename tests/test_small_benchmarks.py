"""Every benchmark on the small world: the real schema, right answers, boxes on the ink, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GenerationConfig

from proxyv.cli import CommandError
from proxyv.eval.__main__ import main
from proxyv.eval.benchmarks import BENCHMARKS, GROUPS
from proxyv.eval.images import row_images
from proxyv.eval.plan import make_record
from proxyv.eval.sources import load_rows
from proxyv.synthetic.scenes import COLOURS, SIGN_COLOUR, make_scene
from proxyv.synthetic.world import write_world
from tests.small_model import save_small_model

PERFECT = {"mme": 1000.0, "mmbench": 100.0, "ocrbench": 0.012}
DOCUMENTS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    write_world(
        out, seed=9, train_documents=0, train_charts=0, test_documents=DOCUMENTS, test_charts=3,
        workers=1, all_benchmarks=True,
    )  # fmt: skip
    return out


def records_of(name: str, world: Path, answer_of: Any) -> list[dict[str, Any]]:
    benchmark, rows = BENCHMARKS[name], load_rows(BENCHMARKS[name], world)
    records = []
    for index in range(len(rows)):
        sample = benchmark.sample(index, rows.text(index))
        if benchmark.needs_image_size:
            [image] = row_images(benchmark, rows, index)
            sample = benchmark.with_image_size(sample, image.size_hw())
        answer = answer_of(sample)
        records.append(make_record(benchmark, rows, index, sample=sample, answer=answer))
    return records


@pytest.mark.parametrize("name", [name for name, task in BENCHMARKS.items() if task.scored])
def test_the_right_answers_get_the_full_score(name: str, world: Path) -> None:
    benchmark = BENCHMARKS[name]
    right = benchmark.scores(records_of(name, world, lambda sample: sample.references[0]))
    best = PERFECT.get(name, 1.0)
    assert right[benchmark.main_score].value == pytest.approx(best, abs=1e-6)
    assert benchmark.is_share == (max(right[benchmark.main_score].parts) <= 1)
    wrong = benchmark.scores(records_of(name, world, lambda _: "zzz"))
    assert wrong[benchmark.main_score].value < 0.05 * best
    if name == "ccpdf":
        assert right["doc_edit_distance"].value == 0.0 < wrong["doc_edit_distance"].value


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_a_row_of_json_may_lack_any_key(name: str, world: Path) -> None:
    """It has a name still, and is asked or refused with the reason."""
    benchmark = BENCHMARKS[name]
    rows = load_rows(benchmark, world)
    for gone in dict(rows[0]):
        row = {key: value for key, value in rows[0].items() if key != gone}
        assert benchmark.question_id(7, row)
        for read in (benchmark.questions, benchmark.images, benchmark.kind, benchmark.group):
            read(row)
        try:
            assert benchmark.sample(7, row).prompt
        except ValueError as error:
            assert gone in str(error) or "message" in str(error)


@pytest.mark.parametrize("name", ["docvqa_test", "mme"])
def test_what_is_paired_or_handed_in_by_an_id_needs_it(name: str, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[name]
    row = dict.fromkeys(benchmark.columns, "1") | {"category": "OCR"}
    nameless = {key: value for key, value in row.items() if key != benchmark.id_column}
    folder = tmp_path / (benchmark.folder or name)
    folder.mkdir()
    (folder / "test.json").write_text(json.dumps([row, nameless]))
    with pytest.raises(CommandError, match=f"row 1 of .* has no '{benchmark.id_column}'"):
        load_rows(benchmark, tmp_path)


@pytest.mark.parametrize("name", ["docvqa_test", "infovqa_test"])
def test_test_splits_keep_their_answers_back(name: str, world: Path) -> None:
    records = records_of(name, world, lambda _: "a word")
    assert len(records) == DOCUMENTS
    sent = BENCHMARKS[name].submission(records)
    assert len({entry["questionId"] for entry in sent}) == DOCUMENTS
    assert all(record["references"] == [] for record in records)


def test_every_category_of_ocrbench_occurs(world: Path) -> None:
    records = records_of("ocrbench", world, lambda _: "")
    assert len({record["kind"] for record in records}) == 10


def test_choices_are_rotated_so_that_no_letter_is_worth_more(world: Path) -> None:
    records = records_of("mmbench", world, lambda _: "A")
    assert BENCHMARKS["mmbench"].scores(records)["circular_accuracy"].value == 0.0
    options = [tuple(record["details"]["options"].values()) for record in records]
    assert all(len(set(texts)) == 4 for texts in options)
    letters = [r["references"][0] for r in records_of("seedbench", world, lambda _: "A")]
    assert all(letters.count(letter) == len(letters) // 4 for letter in "ABCD")


@pytest.mark.parametrize("seed", range(20))
def test_boxes_enclose_exactly_the_ink_of_their_things(seed: int) -> None:
    scene = make_scene(np.random.default_rng(seed), "test", (168, 200))
    pixels = np.asarray(scene.image)
    names = [thing.name for thing in (*scene.shapes, scene.sign)]
    assert len(set(names)) == len(names)
    sign_left, sign_top, sign_right, sign_bottom = scene.sign.box
    elsewhere = np.ones(pixels.shape[:2], bool)
    elsewhere[sign_top:sign_bottom, sign_left:sign_right] = False  # soft edges of letters
    for thing in scene.shapes:
        own = (pixels == COLOURS[thing.colour]).all(-1) & elsewhere
        same = [each for each in scene.shapes if each.colour == thing.colour]
        left, top, right, bottom = thing.box
        inside = np.zeros_like(own)
        inside[top:bottom, left:right] = own[top:bottom, left:right]
        rows, columns = np.nonzero(inside)
        assert abs(rows.min() - top) <= 1 and abs(rows.max() + 1 - bottom) <= 1
        assert abs(columns.min() - left) <= 1 and abs(columns.max() + 1 - right) <= 1
        if len(same) == 1:
            assert (own == inside).all()  # none of it lies outside
    assert not ((pixels == SIGN_COLOUR).all(-1) & elsewhere).any()
    assert (pixels[~elsewhere].max(-1) < 100).sum() > 20  # the word


def test_scenes_follow_from_their_seed() -> None:
    images = [
        np.asarray(make_scene(np.random.default_rng(seed), "test").image) for seed in (1, 1, 2)
    ]
    assert (images[0] == images[1]).all() and (images[0] != images[2]).any()


def test_the_flag_changes_no_other_file(world: Path, tmp_path: Path) -> None:
    write_world(
        tmp_path, seed=9, train_documents=0, train_charts=0, test_documents=DOCUMENTS,
        test_charts=3, workers=1,
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "docvqa").iterdir()) == ["validation.parquet"]
    for file in ("docvqa/validation.parquet", "chartqa/test.parquet"):
        assert (tmp_path / file).read_bytes() == (world / file).read_bytes()


@pytest.mark.parametrize(("name", "side_px"), [("infovqa", 336), ("ccpdf", 336), ("docvqa", 168)])
def test_dense_pages_are_larger(name: str, side_px: int, world: Path) -> None:
    rows = load_rows(BENCHMARKS[name], world)
    [image] = row_images(BENCHMARKS[name], rows, 0)
    assert image.size_hw() == (side_px, side_px)


def test_every_benchmark_runs_offline(world: Path, tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model")
    ends = GenerationConfig.from_pretrained(model)
    ends.eos_token_id = list(range(2, 107, 2))  # half of the characters: answers stay short
    ends.save_pretrained(model)
    command = ["--model", str(model), "--data", str(world), "--device", "cpu", "--limit", "8"]
    command += ["--tasks", ",".join(BENCHMARKS), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    results = json.loads((tmp_path / "out/results.json").read_text("utf-8"))
    assert set(results["tasks"]) == set(BENCHMARKS)
    assert set(results["averages"]) == set(GROUPS)
    assert all(task["failed"] == 0 for task in results["tasks"].values())
