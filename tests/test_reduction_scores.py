"""Every token-reduction method from the public commands: five crops, batches of four, scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from proxyv.eval.answerer import Answerer
from proxyv.eval.records import read_records
from proxyv.reduction import METHODS
from proxyv.reduction.__main__ import main as calibrate
from proxyv.reduction.options import parse_options
from proxyv.study.__main__ import main as study
from tests.small_model import CROP_PX, save_small_model
from tests.small_world import evaluate_small, random_picture, write_docvqa

SIZES = [(2 * CROP_PX, 2 * CROP_PX)] * 4  # a thumbnail and four tiles
QUESTIONS = ["What?", "Which number is printed there?", "Who signed it, and when?", "Total?"]
LEARNED = {"proxy_kind": "learned", "learned_proxies": 3}
MODELS: dict[str, dict[str, Any]] = {
    "base": {"start_layer": None},
    "tokenpacker": {
        "start_layer": None,
        "reduction": {"method": "tokenpacker", "scale": 2, "heads": 2},
    },
    "proxyv": {},
    "learned": LEARNED,
}
ENTRIES = {
    "fastv": "base@method=fastv,layer=1,ratio=0.5",
    "pyramiddrop": 'base@{"method": "pyramiddrop", "layers": [1, 2], "ratios": [0.5, 0.25]}',
    "visionzip": "base@method=visionzip,dominant=5,contextual=2",
    "prumerge": "base@method=prumerge,plus=false",
    "prumerge_plus": "base@method=prumerge,plus=true,ratio=0.07",
    "fitprune": "base@CALIBRATED",
    "tokenpacker": "tokenpacker",
    "average_pool": "base@method=average_pool,block=2",
    "downsample": "base@method=downsample,side=2",
    "random_drop": "base@method=random_drop,tokens=5",
    "proxyv": "proxyv",
    "learned_fastv": "learned@method=fastv,layer=2,ratio=0.5",
    "learned_zip": "learned@method=visionzip,dominant=5,contextual=2",
}


def save_models(folder: Path) -> None:
    for name, options in MODELS.items():
        save_small_model(folder / name, image_aspect_ratio="anyres", **options)


def write_scheme(folder: Path) -> str:
    """Calibrate FitPrune on the pictures; its options as the command writes them."""
    rows = []
    for index, (size, question) in enumerate(zip(SIZES, QUESTIONS, strict=True)):
        random_picture(index, size).save(folder / f"{index}.png")
        asked = {"from": "human", "value": f"<image>\n{question}"}
        said = [asked, {"from": "gpt", "value": "No."}]
        rows.append({"id": str(index), "image": f"{index}.png", "conversations": said})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    given = {"model": folder / "base", "annotations": folder / "rows.json", "images": folder}
    given |= {"output": folder / "scheme.json"}
    options = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    more = ["--device", "cpu", "--samples", "4", "--ratio", "0.3", "--json"]
    assert calibrate(["calibrate", *options, *more]) == 0
    return (folder / "scheme.json").read_text(encoding="utf-8").strip()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and a world whose answers are those of the baseline, asked one by one."""
    folder = tmp_path_factory.mktemp("place")
    save_models(folder)
    write_docvqa(folder / "first", SIZES, QUESTIONS)
    alone = folder / "alone/base"
    assert evaluate_small(folder / "base", folder / "first", alone, "--batch-size", "1") == 0
    said = [record["answer"] for record in read_records(alone / "docvqa.jsonl")]
    assert all(said) and len(set(said)) > 1, "the model answers all alike: the test says nothing"
    write_docvqa(folder / "data", SIZES, QUESTIONS, said)
    return folder


@pytest.fixture(scope="module")
def entries(place: Path) -> dict[str, tuple[Path, str]]:
    """Model and reduction of every entry."""
    scheme = write_scheme(place)
    found = {}
    for name, entry in ENTRIES.items():
        model, _, options = entry.partition("@")
        found[name] = (place / model, scheme if options == "CALIBRATED" else options)
    return found


@pytest.fixture(scope="module")
def compared(place: Path, entries: dict[str, tuple[Path, str]]) -> dict[str, Any]:
    """The table of all of them, four questions at a time, and the batches that were asked."""
    batches: list[dict[str, Tensor]] = []
    original = Answerer.generate

    def noted(self: Answerer, prepared: Any, most: int) -> list[str]:
        batches.append(prepared.rows)
        return original(self, prepared, most)

    words = [f"base={place / 'base'}"]
    words += [f"{n}={model}@{o}" if o else f"{n}={model}" for n, (model, o) in entries.items()]
    options = ["--tasks", "docvqa", "--batch-size", "4", "--repeats", "1", "--device", "cpu"]
    folders = ["--data", str(place / "data"), "--output", str(place / "four")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answerer, "generate", noted)
        assert study(["compare", *words, *options, *folders]) == 0
    table = json.loads((place / "four/compare.json").read_text(encoding="utf-8"))["rows"]
    return {"rows": {row["name"]: row for row in table}, "batches": batches}


def test_every_method_is_among_them(entries: dict[str, tuple[Path, str]]) -> None:
    given = [parse_options(options) for _, options in entries.values() if options]
    assert {"tokenpacker", *(str((one or {})["method"]) for one in given)} == set(METHODS)


def test_batches_are_four_questions_of_several_lengths_about_five_crops(compared) -> None:
    assert len(compared["batches"]) == 1 + len(ENTRIES)
    for batch in compared["batches"]:
        assert batch["num_crops"].tolist() == [5] * 4
        lengths = batch["attention_mask"].sum(dim=1)
        assert len(lengths.unique()) == 4 and torch.equal(
            batch["attention_mask"], batch["attention_mask"].sort(dim=1).values
        ), "padding stands on the left"


def test_the_table_has_a_score_and_a_cost_of_each(compared) -> None:
    rows = compared["rows"]
    assert list(rows) == ["base", *ENTRIES]
    base = rows["base"]
    assert base["score %"] == 100, "in batches the baseline says what it says alone"
    for name in ENTRIES:
        row = rows[name]
        assert 0 <= row["from"] <= row["score %"] <= row["to"] <= 100
        assert row["GFLOPs"] < base["GFLOPs"] and row["prefill ms"] > 0 and row["peak MiB"] > 0
    assert min(rows[name]["score %"] for name in ENTRIES) < 100, "no method changed an answer"


@pytest.mark.parametrize("name", ENTRIES)
def test_a_question_alone_gets_the_answer_and_score_that_it_gets_among_others(
    name, place: Path, entries: dict[str, tuple[Path, str]], compared
) -> None:
    model, options = entries[name]
    alone = place / "alone" / name
    more = ["--reduction", options] if options else []
    assert evaluate_small(model, place / "data", alone, "--batch-size", "1", *more) == 0
    together = read_records(place / "four" / name / "docvqa.jsonl")
    assert together == read_records(alone / "docvqa.jsonl")
    stored = json.loads((alone / "settings.json").read_text(encoding="utf-8"))
    assert stored["batch_size"] == 1
    if options:
        assert stored["reduction"] == parse_options(options)
